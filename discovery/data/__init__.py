"""Prompts and text, where they come from, and the activations that a model has on them."""
