"""Training sparse-autoencoder dictionaries, and measuring what they cost the model."""
