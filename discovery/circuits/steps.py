"""Finished steps of a search on disk: each is written whole, and read instead of done again."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.jobs.sealed_steps import REMEDY, open_json, open_tensors, seal_json, seal_tensors


class Steps:
    """A folder of results by name. Whoever shares it must be the same run: its name and each file say so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def numbers(self, name: str, compute: Callable[[], list[float]]) -> list[float]:
        """A step's numbers from its file, else computed and written."""
        path = self.folder / f"{name}.json"
        if path.exists():
            found = open_json(path, self._identity(name))
            try:
                return [float(value) for value in found]
            except (ValueError, TypeError) as error:
                raise _unreadable(path, error) from error
        result = compute()
        seal_json(path, self._identity(name), result)
        return result

    def text(self, name: str, compute: Callable[[], str]) -> str:
        """A step's text from its file, else computed and written."""
        path = self.folder / f"{name}.json"
        if path.exists():
            found = open_json(path, self._identity(name))
            if not isinstance(found, str):
                raise _unreadable(path, TypeError("it is no text"))
            return found
        result = compute()
        seal_json(path, self._identity(name), result)
        return result

    def tensor(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A step's tensor from its file, else computed and written."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            found, _ = open_tensors(path, self._identity(name))
            try:
                return found["scores"]
            except KeyError as error:
                raise _unreadable(path, error) from error
        result = compute().contiguous()
        seal_tensors(path, self._identity(name), {"scores": result})
        return result

    def _identity(self, name: str) -> list[str]:
        return [self.folder.name, name]


def _unreadable(path: Path, error: Exception) -> DiscoveryError:
    return DiscoveryError(f"{path}: is no finished step ({error}); {REMEDY}")
