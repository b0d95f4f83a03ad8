"""Edit sites, and the model sizes that determine their widths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from interpretops.errors import PlanError

Point = Literal["attn_z", "attn_proj", "attn_out", "mlp_out", "resid_post"]

POINTS: tuple[Point, ...] = get_args(Point)
"""The points of a layer at which an edit may act, in forward-pass order.

All but one read and write one activation. At ``attn_proj``, units read the input of the attention's output
projection (``attn_z``) and write to its output, as a LoRA adapter of that projection does.
"""
HEAD_POINTS: frozenset[Point] = frozenset({"attn_z", "attn_proj"})
"""Points at which units read all heads side by side."""


@dataclass(frozen=True)
class Site:
    """An edit site: a layer and a point in it."""

    layer: int
    point: Point

    @classmethod
    def parse(cls, text: str) -> Site:
        layer, _, point = text.partition(".")
        if point not in POINTS or not layer.isdecimal():
            raise PlanError(f"site = {text!r}, but must be <layer>.<point>, where point is one of {POINTS}")
        return cls(int(layer), point)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts sites in the order of the forward pass."""
        return self.layer, POINTS.index(self.point)

    def __str__(self) -> str:
        return f"{self.layer}.{self.point}"


@dataclass(frozen=True)
class ModelSpec:
    """What a plan must know about the model it was compiled for."""

    name: str
    fingerprint: str
    """sha256 over names, shapes and samples of all weights; see `interpretops.model.spec`."""
    architecture: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def width(self, point: Point) -> int:
        """D of the activation that is written at a point; at ``attn_z`` all heads side by side."""
        return self.num_heads * self.head_dim if point == "attn_z" else self.hidden_size

    def read_width(self, point: Point) -> int:
        """D of the activation that is read at a point; differs from `width` only at ``attn_proj``."""
        return self.num_heads * self.head_dim if point in HEAD_POINTS else self.hidden_size
