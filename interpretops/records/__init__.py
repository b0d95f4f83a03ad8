"""What is kept of people and requests: audit log, transcripts, API keys, and redaction."""
