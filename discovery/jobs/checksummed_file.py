"""Files of finished steps, each with its run's identity and the sha256 of its content.

A damaged file, or one of another run, raises one line that names the file and the remedy.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.jobs.whole_file import write_whole

OF, SUM = "of", "sha256"
REMEDY = "delete it, and run the same again"


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of its keys."""
    # As it is read back from a file, where all keys are strings.
    plain = json.loads(json.dumps(value))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def save_json(path: Path, identity: Any, value: Any) -> None:
    """Write a JSON value."""
    write_whole(path, json.dumps({OF: digest(identity), SUM: digest(value), "value": value}).encode())


def load_json(path: Path, identity: Any) -> Any:
    """Read what `save_json` wrote. Raises `DiscoveryError` if damaged or of another identity."""
    content = _content(path)
    _check(path, content[OF], identity)
    if digest(content["value"]) != content[SUM]:
        raise _damaged(path, "its checksum does not match")
    return content["value"]


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, _first_line(error)) from error
    if not isinstance(content, dict) or content.keys() != {OF, SUM, "value"}:
        raise _damaged(path, "it has unexpected keys")
    return content


def load_json_if_same_run(path: Path, identity: Any) -> Any:
    """As `load_json`, but None if the file is missing or of another identity: it may be overwritten."""
    if not path.exists():
        return None
    content = _content(path)
    return load_json(path, identity) if content[OF] == digest(identity) else None


def save_tensors(
    path: Path, identity: Any, tensors: Mapping[str, Tensor], more: dict[str, str] | None = None
) -> None:
    """Write tensors, and strings as metadata."""
    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    metadata = {**(more or {}), OF: digest(identity)}
    write_whole(path, save_safetensors(whole, {**metadata, SUM: _digest_of(whole, metadata)}))


def load_tensors(path: Path, identity: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and strings that `save_tensors` wrote; raises as `load_json` does."""
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        total = metadata.pop(SUM)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise _damaged(path, _first_line(error)) from error
    _check(path, metadata.get(OF), identity)
    if _digest_of(tensors, metadata) != total:
        raise _damaged(path, "its checksum does not match")
    return tensors, metadata


def _check(path: Path, of: str | None, identity: Any) -> None:
    if of != digest(identity):
        raise DiscoveryError(
            f"{path}: belongs to another run: model, data or settings differ; {REMEDY}, "
            "or give another --work"
        )


def _digest_of(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _damaged(path: Path, why: str) -> DiscoveryError:
    return DiscoveryError(f"{path}: is not a finished step ({why}); {REMEDY}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
