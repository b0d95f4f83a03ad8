"""Listening: the HTTP server below the apps, TLS, and connections that stall."""
