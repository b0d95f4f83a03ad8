"""Selects the policy for a request, and turns policy files into revisions loaded in the engines."""
