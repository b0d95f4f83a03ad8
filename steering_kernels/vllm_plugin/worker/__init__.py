"""In each vLLM worker: edit tables, hooks, batch layout, self-test and reports."""
