"""The op as one fused Triton kernel: reads, computes, gates and writes in place.

Two kernels compute the same: one for the few tokens of a decode step (`triton_token`), one for the many
tokens of a prefill (`triton_tile`).
"""

# Triton's language is not typed:
# mypy: disable-error-code="no-untyped-call,misc"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, float64

from steering_kernels.ops.step import StepMap
from steering_kernels.ops.table import SiteTable
from steering_kernels.ops.triton_tile import edit_tiles
from steering_kernels.ops.triton_token import edit_tokens

CHUNK = 16
TILE, TILE_BLOCK = 16, 128
TOKEN_BLOCK, TOKEN_WARPS = 1024, 8
TOKEN_KERNEL_MAX = 1024
"""Most tokens for which each token gets its own program."""


def apply_edits_triton(
    hidden: Tensor,
    table: SiteTable,
    step: StepMap,
    residual: Tensor | None,
    source: Tensor | None,
    *,
    tiles: bool | None = None,
) -> None:
    """See `apply_edits`. Skips rows with a TopK encoder. ``tiles``: whether to use the tile kernel."""
    tokens = hidden.shape[0]
    if tokens == 0:
        return
    stream = hidden if source is None else source
    summand = hidden if residual is None else residual
    spill = step.spill(table.read.shape[0])
    arguments = (
        hidden,
        stream,
        summand,
        step.row_of_token,
        step.slot_of_token,
        step.gate_open,
        step.edited,
        spill,
        table.start,
        table.count,
        table.read,
        table.write,
        *table.columns.values(),
        table.indices["gate"],
        table.indices["topk"],
        table.scale_start,
        table.scale_count,
        table.scale,
        table.scale_gate,
        tokens,
        hidden.stride(0),
        stream.stride(0),
        summand.stride(0),
        step.gate_open.stride(0),
        spill.stride(0),
    )
    constants: dict[str, Any] = {
        "WIDTH": table.width,
        "READ_WIDTH": table.read_width,
        "HAS_RESIDUAL": residual is not None,
        "ADD_TYPE": tl.float64 if hidden.dtype is float64 else tl.float32,
        "CHUNK": CHUNK,
    }
    widest = max(16, triton.next_power_of_2(max(table.width, table.read_width)))
    if tokens > TOKEN_KERNEL_MAX if tiles is None else tiles:
        grid = (triton.cdiv(tokens, TILE), TILE)
        edit_tiles[grid](*arguments, **constants, TILE=TILE, BLOCK=min(TILE_BLOCK, widest))
    else:
        block = min(TOKEN_BLOCK, widest)
        edit_tokens[(tokens,)](*arguments, **constants, BLOCK=block, num_warps=TOKEN_WARPS)
