"""Finished steps of a search on disk: each is written whole, and read instead of done again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from discovery.errors import DiscoveryError
from interpretops.atomic_file import write_atomically


class Steps:
    """A folder of results by name. Whoever shares it must be the same run: its name says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def numbers(self, name: str, compute: Callable[[], list[float]]) -> list[float]:
        """A step's numbers from its file, else computed and written."""
        path = self.folder / f"{name}.json"
        if path.exists():
            try:
                found: Any = json.loads(path.read_text(encoding="utf-8"))
                return [float(value) for value in found]
            except (OSError, ValueError, TypeError) as error:
                raise _unreadable(path, error) from error
        result = compute()
        self._write(path, json.dumps(result).encode())
        return result

    def tensor(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A step's tensor from its file, else computed and written."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                return load_safetensors(path.read_bytes())["scores"]
            except (OSError, SafetensorError, KeyError) as error:
                raise _unreadable(path, error) from error
        result = compute().contiguous()
        self._write(path, save_safetensors({"scores": result}))
        return result

    def _write(self, path: Path, data: bytes) -> None:
        try:
            write_atomically(path, data)
        except OSError as error:
            raise DiscoveryError(
                f"{path}: cannot be written ({error.strerror or error}); "
                "free space or give another --work, and run the same again"
            ) from error


def _unreadable(path: Path, error: Exception) -> DiscoveryError:
    return DiscoveryError(f"{path}: is no finished step ({error}); delete it, and run the same again")
