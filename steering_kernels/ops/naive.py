"""The reference that defines the op: one token at a time, in float64, without optimisation."""

from __future__ import annotations

import torch
from torch import Tensor

from steering_kernels.ops.table import RowEdits, SiteTable


def apply_edits_reference(
    hidden: Tensor,
    table: SiteTable,
    row_of_token: Tensor,
    gate_open: Tensor,
    residual: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """Edit each token by the rows of its revision.

    hidden        [T, D]  any float dtype; returned as a copy
    row_of_token  [T]     0 leaves the token bit-identical
    gate_open     [T, G]  bool; column 0 is true
    residual      [T, D]  if the stream is ``hidden + residual``: reads use the sum, rounded to its dtype
    source        [T, Dr] if reads use another activation than ``hidden``

    Sums in float64.
    """
    out = hidden.clone()
    stream = hidden if residual is None else hidden + residual
    stream = stream if source is None else source
    for token, row in enumerate(row_of_token.tolist()):
        if row == 0:
            continue
        delta = token_delta_reference(stream[token].double(), table.get_row(row), gate_open[token])
        if delta is not None:
            out[token] = (hidden[token].double() + delta).to(hidden.dtype)
    return out


def token_delta_reference(x: Tensor, edits: RowEdits, gate_open: Tensor) -> Tensor | None:
    """The vector added to one token's activation x [D] float64; None if no edit acts."""
    delta = x.new_zeros(edits.write.shape[1])
    acts = False
    active = _topk_activations(x, edits)
    for k in range(edits.read.shape[0]):
        if not gate_open[int(edits.gate[k])] or x.norm() > edits.max_norm[k].double():
            continue
        u = edits.read[k].double() @ x + edits.bias[k].double()
        a = torch.where(u > edits.threshold[k].double(), u, 0.0)
        if edits.topk[k] >= 0:
            a = active[int(edits.topk[k])]
        clipped = torch.clamp(a, edits.low[k].double(), edits.high[k].double())
        g = edits.gain[k].double() * a + edits.offset[k].double() + (clipped - a)
        if g != 0:
            acts = True
            delta += g * edits.write[k].double()
    for e in range(edits.scale.shape[0]):
        if gate_open[int(edits.scale_gate[e])]:
            acts = True
            delta += edits.scale[e].double() * x
    return delta if acts else None


def _topk_activations(x: Tensor, edits: RowEdits) -> Tensor:
    """[F] activations of a TopK encoder: the k largest pre-activations if positive, zero elsewhere."""
    if edits.topk_read is None or edits.topk_bias is None:
        return torch.zeros(0, dtype=torch.float64)
    u = edits.topk_read.double() @ x + edits.topk_bias.double()
    values, indices = u.topk(edits.topk_k)
    return torch.zeros_like(u).scatter(0, indices, values.relu())


def gate_open_reference(
    above: list[bool], position: list[int], prompt_length: int, *, prompt_end: bool, latched: bool, phase: str
) -> list[bool]:
    """Whether a gate is open at each token of one request, given where its condition holds (``above``)."""
    fires = [
        holds and (not prompt_end or place == prompt_length - 1)
        for holds, place in zip(above, position, strict=True)
    ]
    if latched:
        fires = [any(fires[: index + 1]) for index in range(len(fires))]
    if phase == "prefill":
        return [fire and place < prompt_length for fire, place in zip(fires, position, strict=True)]
    if phase == "decode":
        return [fire and place >= prompt_length - 1 for fire, place in zip(fires, position, strict=True)]
    return fires


def attention_probe_reference(
    x: Tensor, query: Tensor, read: Tensor, bias: Tensor, max_norm: float = float("inf")
) -> float | None:
    """The reading of an attention probe over a prompt x [P, D]; None if all norms are out of bounds."""
    kept = [token.double() for token in x if token.double().norm() <= max_norm]
    if not kept:
        return None
    reading = 0.0
    for head in range(query.shape[0]):
        weights = torch.stack([query[head].double() @ token for token in kept]).softmax(0)
        values = torch.stack([read[head].double() @ token + bias[head].double() for token in kept])
        reading += float(weights @ values)
    return reading


def windows_reference(tokens: int, window: int | None) -> list[range]:
    """The windows over a prompt of this many tokens."""
    if window is None or tokens <= window:
        return [range(tokens)]
    starts = [*range(0, tokens - window, max(1, window // 4)), tokens - window]
    return [range(start, start + window) for start in starts]
