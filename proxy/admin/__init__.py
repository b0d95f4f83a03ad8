"""The admin listener, and reloading what may change while the gateway runs."""
