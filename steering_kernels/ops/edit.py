"""The op's public entry points: check arguments once, and choose the implementation."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from steering_kernels.ops.grouped import apply_edits_grouped
from steering_kernels.ops.step import StepMap
from steering_kernels.ops.table import SiteTable

Backend = Literal["grouped", "triton", "triton-token", "triton-tile"]


def apply_edits(
    hidden: Tensor,
    table: SiteTable,
    step: StepMap,
    residual: Tensor | None = None,
    source: Tensor | None = None,
    *,
    backend: Backend | None = None,
) -> None:
    """Edit the tokens of the current forward pass at one site, in place, by the rows of their revisions.

    hidden    [T', D]  float; T' >= T. Tokens past the step's T are padding and stay unchanged
    table              the site's rows
    step               the pass's tokens, their rows and open gates; increments ``step.edited``
    residual  [T', D]  if the stream is ``hidden + residual``: reads use the sum, writes go to ``hidden``
    source    [T', Dr] if reads use another activation than ``hidden``
    backend            `grouped` runs anywhere. `triton` needs a GPU, is the default there, and chooses its
                       kernel by the number of tokens unless one is named. Rows with a TopK encoder always
                       use `grouped`, since all its features decide which are active

    Tokens of row 0, and tokens at which no edit acts, stay bit-identical. Raises ValueError for wrong shapes
    or dtypes, and RuntimeError for a pass that was not laid out.
    """
    step.check_laid_out()
    if not step.active:
        return
    _check(hidden, table, residual, source)
    tokens = step.num_tokens
    if hidden.shape[0] < tokens:
        raise ValueError(f"hidden has {hidden.shape[0]} tokens, but the step was laid out for {tokens}")
    if hidden.shape[0] > tokens:
        hidden = hidden[:tokens]
        residual = None if residual is None else residual[:tokens]
        source = None if source is None else source[:tokens]
    if table.sum_ranks is not None:  # the Triton kernels do not sum over ranks
        backend = "grouped"
    backend = backend or ("triton" if hidden.is_cuda else "grouped")
    if backend == "grouped":
        apply_edits_grouped(hidden, table, step, residual, source)
        return
    from steering_kernels.ops.triton_edit import (
        apply_edits_triton,  # imported here: not every platform has Triton
    )

    if table.topk_rows:
        apply_edits_grouped(hidden, table, step, residual, source, only=table.topk_rows)
    tiles = None if backend == "triton" else backend == "triton-tile"
    apply_edits_triton(hidden, table, step, residual, source, tiles=tiles)


def apply_edits_captured(
    hidden: Tensor, table: SiteTable, step: StepMap, residual: Tensor | None, source: Tensor | None
) -> None:
    """`apply_edits` for a CUDA graph: the content of ``step`` at replay decides what it does.

    Each of the T' tokens has a program; programs of row 0 return at once. T' must not exceed the step's
    ``graph_tokens``. It does not edit rows with a TopK encoder, nor rows split over ranks: such passes must
    not be replayed.
    """
    _check(hidden, table, residual, source)
    if hidden.shape[0] > step.graph_tokens:
        raise ValueError(f"a graph of {hidden.shape[0]} tokens, but steps hold at most {step.graph_tokens}")
    from steering_kernels.ops.triton_edit import apply_edits_triton

    apply_edits_triton(hidden, table, step, residual, source, tiles=False)


def _check(hidden: Tensor, table: SiteTable, residual: Tensor | None, source: Tensor | None) -> None:
    if hidden.ndim != 2 or hidden.shape[1] != table.width or hidden.stride(1) != 1:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and strides {hidden.stride()}, "
            f"but must be [T, {table.width}] with contiguous rows"
        )
    if not hidden.is_floating_point():
        raise ValueError(f"hidden has dtype {hidden.dtype}, but must be a float")
    if residual is not None and (residual.shape, residual.dtype) != (hidden.shape, hidden.dtype):
        raise ValueError(
            f"residual has shape {tuple(residual.shape)} and dtype {residual.dtype}, "
            f"but hidden {tuple(hidden.shape)} and {hidden.dtype}"
        )
    read_width = table.width if source is None else source.shape[-1]
    if read_width != table.read_width or (source is not None and source.shape[0] != hidden.shape[0]):
        raise ValueError(
            f"source has shape {None if source is None else tuple(source.shape)}, "
            f"but must be [{hidden.shape[0]}, {table.read_width}]"
        )
