"""The edit op, and the plugin that runs it in a vLLM engine."""
