"""The finished steps of a run in its folder: each is written whole, and read instead of done again."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.jobs.checksummed_file import REMEDY, load_json, load_tensors, save_json, save_tensors

Found = TypeVar("Found")


class StepCache:
    """Results by name. Each file says of which run and which step it is; another's is refused."""

    def __init__(self, folder: Path, identity: Any) -> None:
        """``identity``: a JSON value that is another one for every run that would find something else."""
        self.folder = folder
        self.identity = identity

    def has(self, name: str) -> bool:
        """Whether a step with a JSON result is done."""
        return self._json_path(name).exists()

    def json(
        self, name: str, compute: Callable[[], Found], read: Callable[[Any], Found] | None = None
    ) -> Found:
        """A step's JSON result from its file, else computed and written.

        ``read`` makes the result of what JSON has made of it; it raises `ValueError` or `TypeError` for what
        no such step wrote.
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
        """A step's tensors from their file, else computed and written."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            return load_tensors(path, [self.identity, name])[0]
        result = {key: value.contiguous() for key, value in compute().items()}
        save_tensors(path, [self.identity, name], result)
        return result

    def tensor(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A step's one tensor from its file, else computed and written."""
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
    """For `StepCache.json`: a text."""
    if not isinstance(found, str):
        raise TypeError("it is not a text")
    return found


def _unreadable(path: Path, error: Exception) -> DiscoveryError:
    return DiscoveryError(f"{path}: is no finished step ({error}); {REMEDY}")
