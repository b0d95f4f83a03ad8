"""Offline jobs: trace activations, train dictionaries, find circuits, write and measure policies."""
