"""Keeping one process healthy: signals, locks, slow file systems, child processes, open files."""
