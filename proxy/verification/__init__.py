"""Checks that receipts prove answers, and runs the gateway's own requests: canaries and shadows."""
