"""In vLLM's engine core: which plans are resident, for whom, and the salt of their cache blocks."""
