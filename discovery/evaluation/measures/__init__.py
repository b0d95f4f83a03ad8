"""Measures that are taken from the policy itself: its parts, its circuit, its cost."""
