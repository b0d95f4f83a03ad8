"""A lock file, so that only one process writes a given file."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from interpretops.errors import ConfigError


def hold(path: Path, field: str) -> int:
    """Take the lock; closing the returned descriptor releases it. Raises `ConfigError` if it is taken."""
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
            f"{field}: another gateway writes to {path.parent}; give each gateway its own folder"
        ) from error
    return descriptor
