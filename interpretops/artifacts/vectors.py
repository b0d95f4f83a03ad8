"""Vectors and probes that policies name: tensors in a safetensors file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from interpretops.artifacts.dictionary.manifest import sha256_of
from interpretops.errors import PolicyError
from interpretops.files.tensor_file import TensorFile
from interpretops.plan import Array

PROBE_TENSORS = ("query", "read", "bias", "max_norm")
FINGERPRINT_KEY = "model_fingerprint"
"""Metadata key of a vector file: the model it was made from. If present, no other model may use the file."""


@dataclass(frozen=True, eq=False)
class FileVector:
    """A direction and where it came from."""

    values: Array
    """[D]"""
    sha256: str
    """Of the file."""
    model_fingerprint: str | None


@dataclass(frozen=True, eq=False)
class FileProbe:
    """An attention probe (`interpretops.plan.Gate`) and where it came from."""

    layers: dict[int, dict[str, Array]]
    """By layer, lowest first: query [K, D], read [K, D], bias [K], max_norm [1]."""
    sha256: str
    """Of the file."""
    model_fingerprint: str | None


def find_vector_file(name: str, own: Path | None, shared: tuple[Path, ...]) -> Path:
    """The file with that relative name in the policy's own folder, else in the shared folders.

    Never outside these folders. Raises `PolicyError` if shared folders hold different files with this name,
    because the choice must not depend on other files there.
    """
    folders = shared if own is None else (own, *shared)
    found: list[Path] = []
    for folder in folders:
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise PolicyError(f"it points outside {folder}")
        if path.is_file():
            found.append(path)
            if folder == own:
                return path
    if not found:
        raise PolicyError(f"there is no such file in {' or '.join(map(str, folders))}")
    if len({sha256_of(path) for path in found}) > 1:
        raise PolicyError(f"different files have this name: {', '.join(map(str, found))}; rename all but one")
    return found[0]


def read_vector(path: Path, tensor: str | None, width: int) -> FileVector:
    """Read one finite, non-zero vector of this width; raises `PolicyError` with only the reason."""
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


def read_attention_probe(path: Path, width: int) -> FileProbe:
    """Read the attention probe for an activation of this width; raises `PolicyError` with only the reason."""
    file = TensorFile(path, PolicyError)
    layers: dict[int, dict[str, Array]] = {}
    for name in file:
        layer, _, part = name.partition(".")
        if not layer.isdecimal() or part not in PROBE_TENSORS:
            raise PolicyError(
                f"the file holds {name!r}, but an attention probe has only <layer>.{PROBE_TENSORS}"
            )
        layers.setdefault(int(layer), {})[part] = np.array(file[name], np.float32)
    if not layers:
        raise PolicyError("the file is empty")
    for layer, arrays in layers.items():
        heads = arrays["bias"].shape[0] if "bias" in arrays and arrays["bias"].ndim == 1 else 0
        shapes = {"query": (heads, width), "read": (heads, width), "bias": (heads,), "max_norm": (1,)}
        for part, shape in shapes.items():
            found = arrays.get(part)
            if found is None or heads < 1 or found.shape != shape or not np.isfinite(found).all():
                raise PolicyError(
                    f"{layer}.{part} is {'missing' if found is None else list(found.shape)}, but must be "
                    f"finite and [heads, {width}] for query and read, [heads] for bias, [1] for max_norm"
                )
    return FileProbe(dict(sorted(layers.items())), sha256_of(path), file.metadata.get(FINGERPRINT_KEY))
