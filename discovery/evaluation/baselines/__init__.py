"""What a policy must beat on the same prompts: system prompts, random directions, DiffMean."""
