"""Proposals for classes of answers to avoid: edits that read every token."""
