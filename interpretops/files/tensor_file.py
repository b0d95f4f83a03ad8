"""Reads safetensors files lazily with only numpy, including bfloat16; only the rows in use leave the disk."""

import json
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from interpretops.errors import InterpretOpsError
from interpretops.files.regular_file import open_regular

MAX_HEADER_BYTES = 64 * 2**20

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor's entry in the file header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of the first byte from the beginning of the file."""
    end: int


class TensorFile(Mapping[str, npt.NDArray[Any]]):
    """A memory-mapped safetensors file: ``file[name]`` is a read-only array view.

    Raises ``error`` (one of this project's classes) with one line if the file is not valid safetensors.
    """

    def __init__(self, path: Path, error: type[InterpretOpsError]) -> None:
        self.path = path
        self._error = error
        self.metadata: dict[str, str] = {}
        try:
            with open_regular(path) as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as problem:
            raise error(f"{path}: cannot be read as a safetensors file ({problem})") from problem
        self.entries = self._read_header()

    def _read_header(self) -> dict[str, TensorEntry]:
        total = len(self._bytes)
        size = int.from_bytes(self._bytes[:8], "little") if total >= 8 else total
        if size > min(total - 8, MAX_HEADER_BYTES):
            raise self._error(
                f"{self.path}: not a complete safetensors file (header of {size} bytes in {total})"
            )
        try:
            header = json.loads(self._bytes[8 : 8 + size])
            self.metadata = dict(header.pop("__metadata__", {}))
            entries = {}
            for name, item in header.items():
                first, last = item["data_offsets"]
                shape = tuple(item["shape"])
                if not all(type(number) is int for number in (first, last, *shape)):
                    raise self._error(f"{self.path}: tensor {name!r} has sizes that are not integers")
                entry = TensorEntry(name, str(item["dtype"]), shape, 8 + size + first, 8 + size + last)
                dtype = _DTYPES.get(entry.dtype)
                wrong_size = dtype is not None and prod(shape) * dtype.itemsize != last - first
                if not 0 <= first <= last or entry.end > total or min(shape, default=0) < 0 or wrong_size:
                    raise self._error(f"{self.path}: tensor {name!r} does not fit the file; it is damaged")
                entries[name] = entry
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            raise self._error(f"{self.path}: header unreadable ({problem})") from problem
        return entries

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        entry = self.entries[name]
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise self._error(f"{self.path}: tensor {name!r} has dtype {entry.dtype}, which is not supported")
        flat = np.frombuffer(self._bytes, dtype, prod(entry.shape), entry.start)
        return flat.reshape(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Any:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def head(self, name: str, size: int) -> bytes:
        """The first ``size`` bytes of a tensor's data, whatever its dtype."""
        entry = self.entries[name]
        return self._bytes[entry.start : min(entry.end, entry.start + size)]
