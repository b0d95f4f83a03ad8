"""How commands declare options: those that several share, and those made from a job's settings."""
