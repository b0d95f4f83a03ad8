"""The op in plain torch calls, one group of tokens per row: the CPU path.

Sums run in float64, so that a token's result does not depend on how many others share its batch: whatever
order a matrix product takes, the difference is far below the rounding of the model's own dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steering_kernels.ops.step import StepMap
from steering_kernels.ops.table import RowView, SiteTable


def apply_edits_grouped(
    hidden: Tensor,
    table: SiteTable,
    step: StepMap,
    residual: Tensor | None,
    source: Tensor | None,
    *,
    only: frozenset[int] | None = None,
) -> None:
    """See `apply_edits`. ``only``: leave all other rows alone."""
    for row, index in step.groups:
        view = table.views.get(row)
        if view is None or (only is not None and row not in only):
            continue
        gate_open = step.gate_open if index is None else step.gate_open[index]
        if view.gates is not None and not bool(gate_open[:, view.gates].any()):
            continue  # most traffic most of the time: no gate is open, so nothing is read
        part = hidden if index is None else hidden[index]
        stream = part
        if residual is not None:
            stream = part + (residual if index is None else residual[index])
        elif source is not None:
            stream = source if index is None else source[index]
        delta, touched = _row_delta(stream.double(), view, gate_open)
        edited = torch.where(touched[:, None], (part.double() + delta).to(hidden.dtype), part)
        slots = step.slot_of_token if index is None else step.slot_of_token[index]
        step.edited.index_add_(0, slots, touched.long())
        if index is None:
            hidden.copy_(edited)
        else:
            hidden[index] = edited


def _row_delta(x: Tensor, view: RowView, gate_open: Tensor) -> tuple[Tensor, Tensor]:
    """Delta [n, D] float64 and touched [n] bool of n tokens x [n, D] float64 of one row."""
    delta = x.new_zeros(x.shape[0], view.write.shape[1])
    touched = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    if view.rank:
        g = _unit_strength(x, view)
        if view.gated:
            g = torch.where(gate_open[:, view.gate], g, 0.0)
        if view.bounded:
            g = torch.where(x.norm(dim=1, keepdim=True) <= view.max_norm, g, 0.0)
        touched = (g != 0).any(dim=1)
        delta = g @ view.write
    if view.scales:
        open_ = gate_open[:, view.scale_gate]
        delta = delta + x * (open_.double() @ view.scale)
        touched = touched | open_.any(dim=1)
    return delta, touched


def _unit_strength(x: Tensor, view: RowView) -> Tensor:
    """g [n, K] before gates and norm bound."""
    if not view.reads and not view.thresholds and not view.clamps and not len(view.topk_units):
        return view.offset.expand(x.shape[0], -1)
    a = torch.addmm(view.bias, x, view.read_t)
    if view.thresholds:
        a = torch.where(a > view.threshold, a, 0.0)
    if view.topk_read_t is not None and view.topk_bias is not None:
        u = torch.addmm(view.topk_bias, x, view.topk_read_t)
        values, indices = u.topk(view.topk_k, dim=1)
        active = torch.zeros_like(u).scatter(1, indices, values.relu())
        a[:, view.topk_units] = active[:, view.topk[view.topk_units]]
    g = a * view.gain
    if view.offsets:
        g = g + view.offset
    if view.clamps:
        g = g + (torch.clamp(a, view.low, view.high) - a)
    return g
