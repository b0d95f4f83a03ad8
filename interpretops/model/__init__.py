"""Model folders: where they come from, the model's sizes and its family. Needs no torch."""
