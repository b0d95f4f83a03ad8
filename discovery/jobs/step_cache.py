"""Finished steps of a run: each result is written to the run's folder, and read instead of computed again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.jobs.checksummed_file import REMEDY, load_json, load_tensors, save_json, save_tensors

Found = TypeVar("Found")


class StepCache:
    """Results by name. Each file records its run and step; a file of another run or step is refused."""

    def __init__(self, folder: Path, identity: Any) -> None:
        """``identity``: a JSON value with everything that determines the results."""
        self.folder = folder
        self.identity = identity

    def has(self, name: str) -> bool:
        """Whether a step with a JSON result is done."""
        return self._json_path(name).exists()

    def json(
        self, name: str, compute: Callable[[], Found], read: Callable[[Any], Found] | None = None
    ) -> Found:
        """A step's JSON result: read from its file, or computed and written.

        ``read`` converts the decoded JSON back to the result. It raises `ValueError` or `TypeError` for a
        value that this step cannot have written.
        """
        path = self._json_path(name)
        if not path.exists():
            result = compute()
            save_json(path, [self.identity, name], result)
            return result
        found = load_json(path, [self.identity, name])
        try:
            return found if read is None else read(found)
        except (ValueError, TypeError) as error:
            raise _unreadable(path, error) from error

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """A step's tensors: read from their file, or computed and written."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return load_tensors(path, [self.identity, name])[0]
        result = {key: value.contiguous() for key, value in compute().items()}
        save_tensors(path, [self.identity, name], result)
        return result

    def tensor(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A step's only tensor: read from its file, or computed and written."""
        found = self.tensors(name, lambda: {_ONE: compute()})
        if _ONE not in found:
            raise _unreadable(self.folder / f"{name}.safetensors", KeyError(_ONE))
        return found[_ONE]

    def _json_path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


_ONE = "scores"


def numbers(found: Any) -> list[float]:
    """For `StepCache.json`: a list of numbers."""
    return [float(value) for value in found]


def text(found: Any) -> str:
    """For `StepCache.json`: a string."""
    if not isinstance(found, str):
        raise TypeError("it is not a string")
    return found


def _unreadable(path: Path, error: Exception) -> DiscoveryError:
    return DiscoveryError(f"{path}: is not a finished step ({error}); {REMEDY}")
