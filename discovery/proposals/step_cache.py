"""The folder in which a run keeps its finished steps: whole files, refused when they are another run's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.jobs.sealed_steps import digest, open_json, open_tensors, seal_json, seal_tensors
from discovery.jobs.sealed_steps import write_step as write_whole

__all__ = ["Kept", "digest", "write_whole"]

Found = TypeVar("Found")
IDENTITY = "run.json"
_ANEW = "remove the folder or give another --work"


class Kept:
    """Finished steps by name. What is in the folder is read; what is not is done, and written at once."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.identity = identity
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
            found: Found = open_json(path, [self.identity, name])
            return found
        result = compute()
        seal_json(path, [self.identity, name], result)
        return result

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A step's tensors from their file, else computed and written."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return open_tensors(path, [self.identity, name])[0]
        result = {key: value.contiguous() for key, value in compute().items()}
        seal_tensors(path, [self.identity, name], result)
        return result


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiscoveryError(f"{path}: does not tell which run this is ({error}); {_ANEW}") from error
    if not isinstance(found, dict):
        raise DiscoveryError(f"{path}: does not tell which run this is; {_ANEW}")
    return found
