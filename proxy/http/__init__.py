"""The HTTP server below the apps: malformed requests, TLS, and stalled connections."""
