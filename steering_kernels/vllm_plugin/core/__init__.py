"""In vLLM's engine core: admission of requests, resident plans and their holders, and cache salts."""
