"""The admin listener, and reloading configuration while the gateway runs."""
