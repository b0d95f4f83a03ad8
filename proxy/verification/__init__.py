"""Believing an answer only when its receipt proves it; canaries and shadows, asked by the gateway itself."""
