"""Strict file access: atomic writes, bounded reads, and errors that name the file and field."""
