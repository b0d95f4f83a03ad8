"""What operators and auditors see: metrics, readiness, logs, spans, the audit log, kept requests."""
