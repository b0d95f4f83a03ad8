"""Finding the components of a decoder that carry a behaviour, and measuring how far they do."""
