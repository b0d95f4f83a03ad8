"""Files of a job, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

from discovery.errors import DiscoveryError
from interpretops.files.atomic_file import write_atomically


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises `DiscoveryError` if it cannot be written."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise unwritten(path, error) from error


def unwritten(path: Path, error: Exception) -> DiscoveryError:
    """The error for a file or folder that could not be written."""
    why = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return DiscoveryError(
        f"{path}: cannot be written ({why}); finished steps are kept: free space or name another folder, and "
        "run the same command again"
    )


def write_json(path: Path, record: Any) -> None:
    """Write a record as indented JSON."""
    write_whole(path, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
