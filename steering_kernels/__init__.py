"""The edit op and the plugin that brings it into a vLLM engine."""
