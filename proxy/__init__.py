"""The gateway: an OpenAI-style endpoint that binds every request to a policy revision."""
