"""The gateway: an OpenAI-compatible endpoint that binds every request to a policy revision."""
