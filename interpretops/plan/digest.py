"""The digest of a plan's numbers: the same from a plan and from the tables it is loaded into."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from interpretops.plan.sites import Site


def content_digest(
    edits: Mapping[Site, Mapping[str, npt.NDArray[Any]]],
    gates: Sequence[tuple[Site | None, Mapping[str, npt.NDArray[Any]]]],
) -> str:
    """sha256 over the arrays of every site and gate; independent of the order of sites and arrays."""
    digest = hashlib.sha256()

    def feed(where: str, arrays: Mapping[str, npt.NDArray[Any]]) -> None:
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            digest.update(f"{where}.{name}:{array.dtype.str}{array.shape}".encode())
            digest.update(array.tobytes())

    for site in sorted(edits, key=lambda site: site.order):
        feed(str(site), edits[site])
    for index, (reads_at, arrays) in enumerate(gates):
        feed(f"gate {index} {reads_at}", arrays)
    return digest.hexdigest()
