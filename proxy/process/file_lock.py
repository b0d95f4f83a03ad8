"""Makes sure that one process alone writes a file that must not be written by two."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from interpretops.errors import ConfigError


def hold(path: Path, field: str) -> int:
    """A descriptor that holds the lock until it is closed. Raises `ConfigError` when another holds it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"{field}: {path.parent} cannot be written ({error.strerror})") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise ConfigError(
            f"{field}: another gateway writes in {path.parent}; give each its own place"
        ) from error
    return descriptor
