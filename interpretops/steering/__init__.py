"""Steers a model in this process: tables of resident plans, hooks and sessions. Needs torch."""
