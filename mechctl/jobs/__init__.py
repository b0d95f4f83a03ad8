"""Commands that run offline jobs and show their results."""
