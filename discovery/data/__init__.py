"""Prompts and text, their sources, and a model's activations on them."""
