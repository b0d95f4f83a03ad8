"""Trains sparse-autoencoder dictionaries, and measures their cost to the model."""
