"""In each of vLLM's workers: tables, hooks, the layout of each batch, self-test and report."""
