"""Asks a gateway for answers, and keeps them."""
