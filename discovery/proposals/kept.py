"""The folder in which a run keeps its finished steps: whole files, refused when they are another run's."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from discovery.errors import DiscoveryError
from interpretops.atomic_file import write_atomically

Found = TypeVar("Found")
IDENTITY = "run.json"


def digest(value: Any) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Kept:
    """Finished steps by name. What is in the folder is read; what is not is done, and written at once."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / IDENTITY
        if not path.exists():
            if folder.is_dir() and any(folder.iterdir()):
                raise DiscoveryError(f"{folder}: holds other files; give another --work")
            write_whole(path, json.dumps(identity, indent=1, sort_keys=True).encode())
            return
        there = _read_json(path)
        if there != json.loads(json.dumps(identity)):
            changed = [key for key in identity if there.get(key) != json.loads(json.dumps(identity[key]))]
            raise DiscoveryError(
                f"{folder}: is of another run ({', '.join(changed)} differ); remove it or give another --work"
            )

    def has(self, name: str) -> bool:
        """Whether a step with a JSON result is done."""
        return (self.folder / f"{name}.json").exists()

    def json(self, name: str, compute: Callable[[], Found]) -> Found:
        """A step's JSON result from its file, else computed and written."""
        path = self.folder / f"{name}.json"
        if path.exists():
            found: Found = _read_json(path)
            return found
        result = compute()
        write_whole(path, json.dumps(result).encode())
        return result

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A step's tensors from their file, else computed and written."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                return load_safetensors(path.read_bytes())
            except (OSError, SafetensorError) as error:
                raise _damaged(path, error) from error
        result = {key: value.contiguous() for key, value in compute().items()}
        write_whole(path, save_safetensors(result))
        return result


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; a full disk ends in one line."""
    try:
        write_atomically(path, data)
    except OSError as error:
        raise DiscoveryError(
            f"{path}: cannot be written ({error.strerror or error}); finished steps are kept: "
            "free space or name another place, and run the same again"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> DiscoveryError:
    return DiscoveryError(f"{path}: is no finished step ({error}); delete it, and run the same again")
