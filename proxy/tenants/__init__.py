"""Tenants: authentication, rate limits, budgets and billing."""
