"""Vectors and probe directions that policies name: one tensor of a safetensors file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interpretops.dictionary.manifest import sha256_of
from interpretops.errors import PolicyError
from interpretops.plan import Array
from interpretops.tensor_file import TensorFile

FINGERPRINT_KEY = "model_fingerprint"
"""Metadata key of a vector file: the model it was made from. When present, no other model may use it."""


@dataclass(frozen=True, eq=False)
class FileVector:
    """A direction and where it came from."""

    values: Array
    """[D]"""
    sha256: str
    """Of the file."""
    model_fingerprint: str | None


def find_vector_file(name: str, folders: tuple[Path, ...]) -> Path:
    """The file of that relative name in the first folder that has it, never outside of it."""
    for folder in folders:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise PolicyError(f"it leads out of {folder}")
        if path.is_file():
            return path
    places = " or ".join(str(folder) for folder in folders)
    raise PolicyError(f"there is no such file in {places}")


def read_vector(path: Path, tensor: str | None, width: int) -> FileVector:
    """One finite, non-zero vector of a width; raises `PolicyError` with the reason only."""
    file = TensorFile(path, PolicyError)
    names = ", ".join(sorted(file)) or "nothing"
    if tensor is None and len(file) != 1:
        raise PolicyError(f"the file holds {names}; name one of them with 'tensor'")
    name = next(iter(file)) if tensor is None else tensor
    if name not in file:
        raise PolicyError(f"the file has no tensor {name!r}; it holds {names}")
    values = np.array(file[name], np.float32)
    if values.shape not in ((width,), (1, width)):
        raise PolicyError(
            f"tensor {name!r} has shape {list(values.shape)}, and the activation has {width} numbers"
        )
    if not np.isfinite(values).all() or not np.any(values):
        raise PolicyError(f"tensor {name!r} must be finite and not all zeros")
    return FileVector(values.reshape(width), sha256_of(path), file.metadata.get(FINGERPRINT_KEY))
