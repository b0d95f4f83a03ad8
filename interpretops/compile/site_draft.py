"""Collects the edits of one site, row by row, while a policy is compiled, then builds the plan's arrays."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from interpretops.plan import INT_FIELDS, Array, HeadScaling, SiteEdits, TopK, Units, empty_units


@dataclass
class SiteDraft:
    """The edits of one site so far; D is its width."""

    width: int
    topk: TopK | None = None
    topk_owner: str | None = None
    """Id of the TopK dictionary whose encoder the site carries."""
    _units: list[Units] = field(default_factory=list)
    _scales: list[tuple[Array, int]] = field(default_factory=list)

    def add_units(self, *, read: Array, write: Array, gate: int, **values: Any) -> None:
        """Add K units: read and write are [K, D]; any other field of `Units` is [K], one number, or omitted.

        An omitted field has no effect: identity activation, no gain, offset, range or bound.
        """
        defaults: dict[str, Any] = {
            "bias": 0.0,
            "threshold": -np.inf,
            "gain": 0.0,
            "offset": 0.0,
            "low": -np.inf,
            "high": np.inf,
            "max_norm": np.inf,
            "topk": -1,
        }
        count = len(read)
        columns: dict[str, Any] = {
            name: np.broadcast_to(
                np.asarray(value, np.int32 if name in INT_FIELDS else np.float32), (count,)
            ).copy()
            for name, value in (defaults | values | {"gate": gate}).items()
        }
        self._units.append(Units(read=_rows(read), write=_rows(write), **columns))

    def add_head_scale(self, delta: Array, gate: int) -> None:
        """Add one elementwise scaling, [D]."""
        self._scales.append((np.asarray(delta, np.float32), gate))

    def close(self) -> SiteEdits:
        """Build the plan's arrays for this site."""
        units = empty_units(self.width)
        if self._units:
            units = Units(
                **{f.name: np.concatenate([getattr(u, f.name) for u in self._units]) for f in fields(Units)}
            )
        scale = None
        if self._scales:
            deltas, gates = zip(*self._scales, strict=True)
            scale = HeadScaling(np.stack(deltas), np.array(gates, np.int32))
        return SiteEdits(units, scale, self.topk)


def _rows(array: Array) -> Array:
    return np.ascontiguousarray(array, np.float32)
