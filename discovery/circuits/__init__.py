"""Finds the components of a decoder that carry a behaviour, and measures how much of it they carry."""
