"""In vLLM's front end: admission of requests, receipts, the routes for the gateway."""
