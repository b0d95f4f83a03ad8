"""A model as a folder on this disk: where it comes from, its sizes, its family. Needs no torch."""
