"""Measuring a policy: suites of prompts, answers through the gateway, judges, and the Risk Card."""
