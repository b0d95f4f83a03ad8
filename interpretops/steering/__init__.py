"""Steering a model in this process: the tables of resident plans, hooks, sessions. Needs torch."""
