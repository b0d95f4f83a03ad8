"""Records about people and requests: audit log, transcripts and API keys, and their redaction."""
