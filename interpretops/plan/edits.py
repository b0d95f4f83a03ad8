"""What a plan does at a site: rank-one edits and head scales.

Shape letters: D width of the site, K rank-one edits (units) at a site, F features of a dictionary,
E head-scale edits.

At a site, with activation ``x [D]``, every unit k reads the same original ``x`` and the deltas sum::

    u  = read[k] . x + bias[k]
    a  = u if u > threshold[k] else 0          # identity: -inf; ReLU: 0; JumpReLU: theta
    g  = gain[k]*a + offset[k] + (clip(a, low[k], high[k]) - a)
    x' = x + open(gate[k]) * [|x| <= max_norm[k]] * g * write[k]

| intervention | read | threshold | gain | offset | low, high | write |
|---|---|---|---|---|---|---|
| feature_scale s | encoder row | the SAE's | s-1 | 0 | -inf, inf | decoder row |
| feature_clamp | encoder row | the SAE's | 0 | 0 | lo, hi | decoder row |
| steering_vector c | 0 | -inf | 0 | c | -inf, inf | vector |
| direction_ablation c | unit v | -inf | -c | 0 | -inf, inf | unit v |
| lora_gate alpha | A row | -inf or 0 | alpha | 0 | -inf, inf | B column |
"""

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Units:
    """The rank-one edits of one site, K of them; see the module's formula."""

    read: Array
    write: Array
    bias: Array
    threshold: Array
    gain: Array
    offset: Array
    low: Array
    high: Array
    max_norm: Array
    gate: IntArray
    """[K] index into `Plan.gates`."""
    topk: IntArray
    """[K] row of the site's `TopK` whose activation replaces the unit's own, or -1."""

    def __len__(self) -> int:
        return int(self.read.shape[0])


@dataclass(frozen=True, eq=False)
class HeadScaling:
    """Elementwise scaling at ``attn_z``: ``x' += open(gate) * delta * x``."""

    delta: Array
    """[E, D] scale minus one on the slices of the named heads, zero elsewhere."""
    gate: IntArray


@dataclass(frozen=True, eq=False)
class TopK:
    """A whole TopK encoder: a feature is active iff its reading is positive and among the k largest."""

    read: Array
    bias: Array
    k: int


@dataclass(frozen=True, eq=False)
class SiteEdits:
    """Everything that one plan does at one site."""

    units: Units
    head_scale: HeadScaling | None = None
    topk: TopK | None = None


UNIT_FIELDS = tuple(f.name for f in fields(Units))
INT_FIELDS = frozenset({"gate", "topk"})


def empty_units(width: int) -> Units:
    """No units at a site of width D."""
    arrays: dict[str, Any] = {
        name: np.zeros(0, np.int32 if name in INT_FIELDS else np.float32) for name in UNIT_FIELDS
    }
    arrays["read"] = arrays["write"] = np.zeros((0, width), np.float32)
    return Units(**arrays)
