"""In vLLM's front end: request validation, receipts, and the routes for the gateway."""
