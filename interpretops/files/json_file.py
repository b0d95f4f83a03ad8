"""Reads the JSON configuration files that come with weights: bounded, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from interpretops.errors import InterpretOpsError
from interpretops.files.regular_file import read_regular

MAX_BYTES = 16 * 2**20


def read_json_object(path: Path, error: type[InterpretOpsError]) -> dict[str, Any]:
    """Read a JSON object from a file of at most 16 MiB; raises ``error`` with one line."""
    try:
        data = read_regular(path, MAX_BYTES)
        if len(data) > MAX_BYTES:
            raise error(f"{path}: is larger than the limit of {MAX_BYTES} bytes")
        value = json.loads(data)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem})") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: is not JSON ({problem})") from problem
    if not isinstance(value, dict):
        raise error(f"{path}: must hold a JSON object")
    return value


def object_in(config: dict[str, Any], key: str) -> dict[str, Any]:
    """The object under a key, or an empty one."""
    found = config.get(key)
    return found if isinstance(found, dict) else {}
