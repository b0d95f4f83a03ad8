"""Commands about policies: validate, compile, compare, try out."""
