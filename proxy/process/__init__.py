"""Process-level concerns: signals, file locks, slow file systems, child processes and open-file limits."""
