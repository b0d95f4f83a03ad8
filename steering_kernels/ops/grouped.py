"""The op in plain torch, one group of tokens per row: the CPU path.

Sums in float64, so that a token's result does not depend on its batch: differences from the order of
summation are far below the rounding of the model's own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steering_kernels.ops.ranks import SumRanks, norm, project
from steering_kernels.ops.step import StepMap
from steering_kernels.ops.table import RowView, SiteTable

JOIN_MAX_TOKENS = 64
"""Most tokens for which all rows of a batch are computed together: there, call overhead exceeds
arithmetic."""


def apply_edits_grouped(
    hidden: Tensor,
    table: SiteTable,
    step: StepMap,
    residual: Tensor | None,
    source: Tensor | None,
    *,
    only: frozenset[int] | None = None,
) -> None:
    """See `apply_edits`. ``only``: the rows to edit; None: all."""
    joinable = only is None and not table.topk and table.sum_ranks is None
    if len(step.rows) > 1 and step.num_tokens <= JOIN_MAX_TOKENS and joinable:
        _apply_joined(hidden, table, step, residual, source)
        return
    for row in step.rows:
        view = table.views.get(row)
        if view is None or (only is not None and row not in only):
            continue
        index = step.tokens_of(row)
        gate_open = step.gate_open if index is None else step.gate_open[index]
        # If ranks sum their readings, every rank must take part, whatever its gates say.
        if table.sum_ranks is None and view.gates is not None and not bool(gate_open[:, view.gates].any()):
            continue  # the common case: no gate is open, so nothing is read
        part = hidden if index is None else hidden[index]
        stream = part
        if residual is not None:
            stream = part + (residual if index is None else residual[index])
        elif source is not None:
            stream = source if index is None else source[index]
        delta, touched = _row_delta(stream.double(), view, gate_open, table.sum_ranks)
        edited = torch.where(touched[:, None], (part.double() + delta).to(hidden.dtype), part)
        slots = step.slot_of_token if index is None else step.slot_of_token[index]
        step.edited.index_add_(0, slots, touched.long())
        if index is None:
            hidden.copy_(edited)
        else:
            hidden[index] = edited


def _apply_joined(
    hidden: Tensor, table: SiteTable, step: StepMap, residual: Tensor | None, source: Tensor | None
) -> None:
    """All rows of a decode step at once: each token reads the units of all rows and keeps its own."""
    rows = tuple(row for row in step.rows if row in table.views)
    if not rows:
        return
    joined = table.join(rows)
    row_of_token = step.row_of_token[:, None]
    units = step.gate_open[:, joined.view.gate] & (row_of_token == joined.row_of_unit)
    scales = step.gate_open[:, joined.view.scale_gate] & (row_of_token == joined.row_of_scale)
    if not bool(units.any()) and not bool(scales.any()):
        return
    stream = source if source is not None else hidden if residual is None else hidden + residual
    delta, touched = _delta(stream.double(), joined.view, units, scales)
    step.edited.index_add_(0, step.slot_of_token, touched.long())
    hidden.copy_(torch.where(touched[:, None], (hidden.double() + delta).to(hidden.dtype), hidden))


def _row_delta(
    x: Tensor, view: RowView, gate_open: Tensor, sum_ranks: SumRanks | None
) -> tuple[Tensor, Tensor]:
    """Delta [n, D] float64 and touched [n] bool for n tokens x [n, D] float64 of one row."""
    units = gate_open[:, view.gate] if view.gated else None
    return _delta(x, view, units, gate_open[:, view.scale_gate], sum_ranks)


def _delta(
    x: Tensor, view: RowView, units: Tensor | None, scales: Tensor, sum_ranks: SumRanks | None = None
) -> tuple[Tensor, Tensor]:
    """As `_row_delta`, given which units [n, K] and head scales [n, E] act; None: all units."""
    delta = x.new_zeros(x.shape[0], view.write.shape[1])
    touched = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    if view.rank:
        g = _unit_strength(x, view, sum_ranks)
        if units is not None:
            g = torch.where(units, g, 0.0)
        if view.bounded:
            g = torch.where(norm(x, sum_ranks)[:, None] <= view.max_norm, g, 0.0)
        touched = (g != 0).any(dim=1)
        delta = g @ view.write
    if view.scales:
        delta = delta + x * (scales.double() @ view.scale)
        touched = touched | scales.any(dim=1)
    return delta, touched


def _unit_strength(x: Tensor, view: RowView, sum_ranks: SumRanks | None) -> Tensor:
    """g [n, K] before gates and norm bound."""
    if not view.reads and not view.thresholds and not view.clamps and not len(view.topk_units):
        return view.offset.expand(x.shape[0], -1)
    a = project(x, view.read_t, view.bias, sum_ranks)
    if view.thresholds:
        a = torch.where(a > view.threshold, a, 0.0)
    if view.topk_read_t is not None and view.topk_bias is not None:
        u = project(x, view.topk_read_t, view.topk_bias, sum_ranks)
        values, indices = u.topk(view.topk_k, dim=1)
        active = torch.zeros_like(u).scatter(1, indices, values.relu())
        a[:, view.topk_units] = active[:, view.topk[view.topk_units]]
    g = a * view.gain
    if view.offsets:
        g = g + view.offset
    if view.clamps:
        g = g + (torch.clamp(a, view.low, view.high) - a)
    return g
