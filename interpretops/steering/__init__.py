"""Applies plans to a model in this process: tables and hooks, for vLLM's workers and the SDK. Needs torch."""
