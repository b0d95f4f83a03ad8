"""The table of one edit site: the units of all resident revisions, in fixed storage."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from steering_kernels.ops.ranks import SumRanks


class TableFullError(Exception):
    """The row does not fit in the site's table; the message gives needed and used space."""


@dataclass(frozen=True, eq=False)
class RowEdits:
    """The edits of one revision at one site. Field meanings and formula: `interpretops.plan`."""

    read: Tensor
    """[K, D] float32"""
    write: Tensor
    """[K, D] float32"""
    bias: Tensor
    """[K] float32, as are the six fields below"""
    threshold: Tensor
    gain: Tensor
    offset: Tensor
    low: Tensor
    high: Tensor
    max_norm: Tensor
    gate: Tensor
    """[K] int32, gate of the row; 0 is always open"""
    topk: Tensor
    """[K] int32, row of `topk_read` whose activation this unit uses, or -1"""
    scale: Tensor
    """[E, D] float32, elementwise deltas"""
    scale_gate: Tensor
    """[E] int32"""
    topk_read: Tensor | None = None
    """[F, D] float32"""
    topk_bias: Tensor | None = None
    """[F] float32"""
    topk_k: int = 0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with its name, in a fixed order."""
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                yield item.name, value


_UNIT_COLUMNS = ("bias", "threshold", "gain", "offset", "low", "high", "max_norm")
_UNIT_INDICES = ("gate", "topk")


class RowView:
    """One row of a table, prepared for the CPU path: values in float64, and flags for what can be skipped."""

    def __init__(self, edits: RowEdits, *, sharded: bool = False) -> None:
        self.read_t = edits.read.double().t().contiguous()
        self.write = edits.write.double()
        self.bias = edits.bias.double()
        self.threshold = edits.threshold.double()
        self.gain = edits.gain.double()
        self.offset = edits.offset.double()
        self.low = edits.low.double()
        self.high = edits.high.double()
        self.max_norm = edits.max_norm.double()
        self.gate = edits.gate.long()
        self.rank = edits.read.shape[0]
        # Even if this rank's part is zero, other ranks may read and wait for this rank's part of the sum.
        self.reads = sharded or bool(edits.read.any()) or bool(edits.bias.any())
        self.offsets = bool(edits.offset.any())
        self.clamps = bool(torch.isfinite(edits.low).any() or torch.isfinite(edits.high).any())
        self.thresholds = bool((edits.threshold > -torch.inf).any())
        self.gated = bool((edits.gate != 0).any())
        gate_ids = sorted({*edits.gate.tolist(), *edits.scale_gate.tolist()})
        self.gates = (
            None if 0 in gate_ids else torch.tensor(gate_ids, dtype=torch.long, device=edits.gate.device)
        )
        """Gates of which one must be open for the row to act here; None if it acts without a gate."""
        self.bounded = bool(torch.isfinite(edits.max_norm).any())
        self.scale = edits.scale.double()
        self.scale_gate = edits.scale_gate.long()
        self.scales = edits.scale.shape[0] > 0
        self.topk = edits.topk.long()
        self.topk_units = (self.topk >= 0).nonzero().flatten()
        self.topk_read_t = None if edits.topk_read is None else edits.topk_read.double().t().contiguous()
        self.topk_bias = None if edits.topk_bias is None else edits.topk_bias.double()
        self.topk_k = edits.topk_k


@dataclass(frozen=True, eq=False)
class JoinedRows:
    """The units of several rows concatenated, and the row of each."""

    view: RowView
    row_of_unit: Tensor
    row_of_scale: Tensor


class SiteTable:
    """Fixed storage for the units of one site. Row 0 is the exact no-op and stays empty.

    Loading and unloading revisions only changes content: no tensor is allocated or moved, so captured graphs
    may hold the addresses. (TopK encoders are the exception: they are stored outside the table.)
    """

    def __init__(
        self,
        width: int,
        *,
        rows: int,
        units: int,
        scales: int,
        device: torch.device,
        read_width: int | None = None,
        sum_ranks: SumRanks | None = None,
    ) -> None:
        """``read_width``: width of the activation that units read, if it differs from the one they write.

        ``sum_ranks``: set if the read activation, and the rows' ``read`` and ``topk_read``, are split over
        ranks.
        """
        self.width = width
        self.sum_ranks = sum_ranks
        self.read_width = width if read_width is None else read_width
        self.rows = rows
        self.read = torch.zeros(units, self.read_width, device=device)
        self.write = torch.zeros(units, width, device=device)
        self.columns = {name: torch.zeros(units, device=device) for name in _UNIT_COLUMNS}
        self.indices = {name: torch.zeros(units, dtype=torch.int32, device=device) for name in _UNIT_INDICES}
        self.start = torch.zeros(rows, dtype=torch.int32, device=device)
        self.count = torch.zeros(rows, dtype=torch.int32, device=device)
        self.scale = torch.zeros(scales, width, device=device)
        self.scale_gate = torch.zeros(scales, dtype=torch.int32, device=device)
        self.scale_start = torch.zeros(rows, dtype=torch.int32, device=device)
        self.scale_count = torch.zeros(rows, dtype=torch.int32, device=device)
        self.topk: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._joined: tuple[tuple[int, ...], JoinedRows] | None = None
        """Cached result of `join`: a batch keeps its rows for many steps."""
        self.views: dict[int, RowView] = {}
        """Occupied rows, by row number."""

    @property
    def topk_rows(self) -> frozenset[int]:
        """Rows with units that use a TopK encoder."""
        return frozenset(row for row in self.topk if len(self.views[row].topk_units))

    def set_row(self, row: int, edits: RowEdits) -> None:
        """Store edits in an empty row. Raises `TableFullError`, changing nothing, if they do not fit."""
        if not 1 <= row < self.rows:
            raise IndexError(f"row = {row}, but must be in 1..{self.rows - 1}")
        if row in self.views:
            raise ValueError(f"row {row} is occupied; clear it first")
        if (edits.read.shape[1], edits.write.shape[1]) != (self.read_width, self.width):
            raise ValueError(
                f"edits have read width {edits.read.shape[1]} and write width {edits.write.shape[1]}, "
                f"but the site has {self.read_width} and {self.width}"
            )
        units = _fit(self.start, self.count, edits.read.shape[0], self.read.shape[0], "units")
        scales = _fit(
            self.scale_start, self.scale_count, edits.scale.shape[0], self.scale.shape[0], "head scales"
        )
        end = units + edits.read.shape[0]
        self.read[units:end] = edits.read
        self.write[units:end] = edits.write
        for name, column in (self.columns | self.indices).items():
            column[units:end] = getattr(edits, name)
        self.scale[scales : scales + edits.scale.shape[0]] = edits.scale
        self.scale_gate[scales : scales + edits.scale.shape[0]] = edits.scale_gate
        self.start[row], self.count[row] = units, edits.read.shape[0]
        self.scale_start[row], self.scale_count[row] = scales, edits.scale.shape[0]
        if edits.topk_read is not None and edits.topk_bias is not None:
            device = self.read.device
            self.topk[row] = (
                edits.topk_read.to(device, copy=True),
                edits.topk_bias.to(device, copy=True),
                edits.topk_k,
            )
        self.views[row] = RowView(self.get_row(row), sharded=self.sum_ranks is not None)
        self._joined = None

    def get_row(self, row: int) -> RowEdits:
        """The row's content; the tensors share the table's storage."""
        units = slice(int(self.start[row]), int(self.start[row]) + int(self.count[row]))
        scales = slice(int(self.scale_start[row]), int(self.scale_start[row]) + int(self.scale_count[row]))
        topk_read, topk_bias, k = self.topk.get(row, (None, None, 0))
        return RowEdits(
            read=self.read[units],
            write=self.write[units],
            **{name: column[units] for name, column in (self.columns | self.indices).items()},
            scale=self.scale[scales],
            scale_gate=self.scale_gate[scales],
            topk_read=topk_read,
            topk_bias=topk_bias,
            topk_k=k,
        )

    def join(self, rows: tuple[int, ...]) -> JoinedRows:
        """The units of several occupied rows without TopK encoders, in one view."""
        if self._joined is None or self._joined[0] != rows:
            parts = [dict(self.get_row(row).tensors()) for row in rows]
            joined: dict[str, Any] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            owners = [
                torch.tensor(
                    [row for row, part in zip(rows, parts, strict=True) for _ in range(len(part[what]))],
                    dtype=torch.int64,
                    device=self.read.device,
                )
                for what in ("read", "scale")
            ]
            self._joined = rows, JoinedRows(RowView(RowEdits(**joined)), *owners)
        return self._joined[1]

    def clear_row(self, row: int) -> None:
        """Empty a row and free its units. Clearing an empty row does nothing."""
        self.views.pop(row, None)
        self._joined = None
        self.topk.pop(row, None)
        self.count[row] = self.start[row] = 0
        self.scale_count[row] = self.scale_start[row] = 0


def _fit(starts: Tensor, counts: Tensor, needed: int, capacity: int, what: str) -> int:
    """Start of the first gap of ``needed`` free entries. Raises `TableFullError`."""
    if needed == 0:
        return 0
    taken = sorted(
        (start, start + count) for start, count in zip(starts.tolist(), counts.tolist(), strict=True) if count
    )
    begin = 0
    for start, end in taken:
        if start - begin >= needed:
            return begin
        begin = max(begin, end)
    if capacity - begin >= needed:
        return begin
    used = sum(end - start for start, end in taken)
    raise TableFullError(f"{needed} {what} needed, but {used} of {capacity} are in use at this site")
