"""The public app: takes an accepted request to the engine's answer, or to an error."""
