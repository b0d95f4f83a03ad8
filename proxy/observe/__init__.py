"""Observability: metrics, readiness, logs, tracing, the audit log and transcripts."""
