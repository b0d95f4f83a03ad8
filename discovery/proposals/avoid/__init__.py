"""Proposals for classes whose aim is `avoid`: answers show a trait less; edits act on every token."""
