"""The parts of a plan: rank-one edits at sites and the gates that open them.

Shape letters: D width of the site, K rank-one edits (units) at a site, C conditions of a gate,
F features of a dictionary, E head-scale edits.

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
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from interpretops.site import Site

Combine = Literal["any", "all"]
Scope = Literal["token", "prompt_end", "prompt"]
Phase = Literal["both", "prefill", "decode"]

MAX_GATES = 8
"""Most gates one plan may carry, the implicit always-open one included."""

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
    """[K] row of the site's `TopK` whose activation this unit takes instead of its own, or -1."""

    def __len__(self) -> int:
        return int(self.read.shape[0])


@dataclass(frozen=True, eq=False)
class HeadScale:
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
    """All that one plan does at one site."""

    units: Units
    head_scale: HeadScale | None = None
    topk: TopK | None = None


@dataclass(frozen=True, eq=False)
class ProbePart:
    """The K heads of an attention probe at one site."""

    site: Site
    query: Array
    """[K, D]"""
    read: Array
    """[K, D]"""
    bias: Array
    """[K]"""
    max_norm: float = float("inf")


PROBE_FIELDS = ("query", "read", "bias")


@dataclass(frozen=True, eq=False)
class Gate:
    """When edits act. Fires at a token iff ``read . x + bias > cut`` for any or all of its conditions.

    A gate without conditions fires at every token, so that only its phase counts. One of scope `prompt` has
    an attention probe instead, in parts of K heads at sites of their own, the last at the gate's. Over the
    tokens t of the prompt whose norm is within a part's ``max_norm``, the sum over parts of

        sum_k sum_t softmax_t(query[k] . x_t) (read[k] . x_t + bias[k])

    must exceed cut[0].
    """

    site: Site | None
    read: Array
    bias: Array
    cut: Array
    combine: Combine = "any"
    scope: Scope = "token"
    """`prompt_end` reads the last token of the prompt alone; `prompt` decides there by all of it."""
    latched: bool = False
    """Stay open from the first firing position to the end of the request; else only at the firing token."""
    phase: Phase = "both"
    max_norm: float = float("inf")
    probe: tuple[ProbePart, ...] = ()

    @property
    def tensors(self) -> dict[str, Array]:
        """The gate's numbers by name."""
        found = {"read": self.read, "bias": self.bias, "cut": self.cut}
        for part in self.probe:
            found |= {f"{part.site}.{name}": getattr(part, name) for name in PROBE_FIELDS}
        return found

    def __len__(self) -> int:
        return int(self.read.shape[0])


def _no_conditions() -> Array:
    return np.zeros((0, 0), np.float32)


ALWAYS = Gate(None, _no_conditions(), np.zeros(0, np.float32), np.zeros(0, np.float32))
"""Gate 0 of every plan."""

UNIT_FIELDS = tuple(f.name for f in fields(Units))
INT_FIELDS = frozenset({"gate", "topk"})


def empty_units(width: int) -> Units:
    """No units at a site of width D."""
    arrays: dict[str, Any] = {
        name: np.zeros(0, np.int32 if name in INT_FIELDS else np.float32) for name in UNIT_FIELDS
    }
    arrays["read"] = arrays["write"] = np.zeros((0, width), np.float32)
    return Units(**arrays)
