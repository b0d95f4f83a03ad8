"""The fused kernel for prefill: each row is read once per tile of tokens.

Each token has a program. If its token is the first of its row in the tile of `TILE` tokens, the program
computes that row for the whole tile; otherwise, and for row 0, it returns after loading the tile's row
indices. All products have the same shape for any batch, so a token's result does not depend on its batch.
Sums in float32. A row's first `CHUNK` units stay in registers; the strengths of further units pass through
``spill``.
"""

# Triton's language is not typed:
# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,misc"

from __future__ import annotations

import triton
import triton.language as tl

from steering_kernels.ops.triton_units import stream_at, unit_delta


@triton.jit(do_not_specialize=["tokens"])
def edit_tiles(
    hidden,
    stream,
    summand,
    row_of_token,
    slot_of_token,
    gate_open,
    edited,
    spill,
    start,
    count,
    read,
    write,
    bias,
    threshold,
    gain,
    offset,
    low,
    high,
    max_norm,
    gate,
    topk,
    scale_start,
    scale_count,
    scale,
    scale_gate,
    tokens,
    hidden_stride,
    stream_stride,
    summand_stride,
    gate_stride,
    spill_stride,
    WIDTH: tl.constexpr,  # noqa: N803  # Triton's way to write constants
    READ_WIDTH: tl.constexpr,  # noqa: N803
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803
    ADD_TYPE: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    lane = tl.program_id(1)
    lanes = tl.arange(0, TILE)
    token = (tl.program_id(0) * TILE + lanes).to(tl.int64)
    row_of_lane = tl.load(row_of_token + token, mask=token < tokens, other=0).to(tl.int32)
    row = tl.sum(tl.where(lanes == lane, row_of_lane, 0), axis=0)
    if row == 0:
        return
    mine = row_of_lane == row
    if tl.min(tl.where(mine, lanes, TILE), axis=0) != lane:
        return

    first = tl.load(start + row)
    units = tl.load(count + row)
    first_scale = tl.load(scale_start + row)
    scales = tl.load(scale_count + row)
    ks = tl.arange(0, CHUNK)
    gates = gate_open + token[:, None] * gate_stride

    # The common case: no gate is open, so nothing is read.
    opened = tl.zeros([TILE], tl.int32)
    encoder = -1
    for chunk in range(0, units, CHUNK):
        encoders = tl.load(topk + first + chunk + ks, mask=chunk + ks < units, other=-1)
        encoder = tl.maximum(encoder, tl.max(encoders, axis=0))
        column = tl.load(gate + first + chunk + ks, mask=chunk + ks < units, other=0)
        is_open = tl.load(
            gates + column[None, :], mask=mine[:, None] & (chunk + ks < units)[None, :], other=0
        )
        opened = tl.maximum(opened, tl.max(is_open.to(tl.int32), axis=1))
    scaled = tl.zeros([TILE], tl.int32)
    for index in range(scales):
        column = tl.load(scale_gate + first_scale + index)
        is_open = tl.load(gate_open + token * gate_stride + column, mask=mine, other=0)
        scaled = tl.maximum(scaled, is_open.to(tl.int32))
    if (tl.max(opened, axis=0) + tl.max(scaled, axis=0) == 0) | (encoder >= 0):
        return

    # Read: u = read . x + bias, and each unit's strength g.
    g0 = tl.zeros([TILE, CHUNK], tl.float32)
    touched = scaled
    for chunk in range(0, units, CHUNK):
        k = first + chunk + ks
        live = chunk + ks < units
        u = tl.zeros([TILE, CHUNK], tl.float32)
        square = tl.zeros([TILE], tl.float32)
        for begin in range(0, READ_WIDTH, BLOCK):
            d = begin + tl.arange(0, BLOCK)
            inside = mine[:, None] & (d < READ_WIDTH)[None, :]
            place = token[:, None] * stream_stride + d[None, :]
            other_place = token[:, None] * summand_stride + d[None, :]
            x = stream_at(stream, summand, place, other_place, inside, HAS_RESIDUAL, ADD_TYPE)
            weight = tl.load(
                read + k[:, None].to(tl.int64) * READ_WIDTH + d[None, :],
                mask=live[:, None] & (d < READ_WIDTH)[None, :],
                other=0.0,
            )
            u = tl.dot(x, tl.trans(weight), acc=u, input_precision="ieee")
            square += tl.sum(x * x, axis=1)
        g = unit_delta(u, k, live, bias, threshold, gain, offset, low, high)
        column = tl.load(gate + k, mask=live, other=0)
        acts = tl.load(gates + column[None, :], mask=mine[:, None] & live[None, :], other=0) != 0
        acts &= tl.sqrt(square)[:, None] <= tl.load(max_norm + k, mask=live, other=0.0)[None, :]
        g = tl.where(acts, g, 0.0)
        touched = tl.maximum(touched, tl.max((g != 0.0).to(tl.int32), axis=1))
        if chunk == 0:
            g0 = g
        else:
            tl.store(
                spill + token[:, None] * spill_stride + (chunk + ks)[None, :],
                g,
                mask=mine[:, None] & live[None, :],
            )
    if units > CHUNK:
        tl.debug_barrier()  # other threads of this program read the spilled values

    # Write: tokens that no unit touches are not stored, so they stay bit-identical.
    changes = mine & (touched != 0)
    slot = tl.load(slot_of_token + token, mask=changes, other=0)
    tl.atomic_add(edited + slot, tl.full([TILE], 1, tl.int64), mask=changes, sem="relaxed")
    for begin in range(0, WIDTH, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        inside = changes[:, None] & (d < WIDTH)[None, :]
        columns = (d < WIDTH)[None, :]
        weight = tl.load(
            write + (first + ks)[:, None].to(tl.int64) * WIDTH + d[None, :],
            mask=(ks < units)[:, None] & columns,
            other=0.0,
        )
        delta = tl.dot(g0, weight, input_precision="ieee")
        for chunk in range(CHUNK, units, CHUNK):
            live = chunk + ks < units
            g = tl.load(
                spill + token[:, None] * spill_stride + (chunk + ks)[None, :],
                mask=mine[:, None] & live[None, :],
                other=0.0,
            )
            weight = tl.load(
                write + (first + chunk + ks)[:, None].to(tl.int64) * WIDTH + d[None, :],
                mask=live[:, None] & columns,
                other=0.0,
            )
            delta = tl.dot(g, weight, acc=delta, input_precision="ieee")
        place = hidden + token[:, None] * hidden_stride + d[None, :]
        before = tl.load(place, mask=inside, other=0.0)
        if scales > 0:
            read_place = token[:, None] * stream_stride + d[None, :]
            other_place = token[:, None] * summand_stride + d[None, :]
            x = stream_at(stream, summand, read_place, other_place, inside, HAS_RESIDUAL, ADD_TYPE)
            for index in range(scales):
                column = tl.load(scale_gate + first_scale + index)
                is_open = tl.load(gate_open + token * gate_stride + column, mask=mine, other=0) != 0
                factor = tl.load(scale + (first_scale + index) * WIDTH + d, mask=d < WIDTH, other=0.0)
                delta += tl.where(is_open[:, None], x * factor[None, :], 0.0)
        after = before.to(ADD_TYPE) + delta.to(ADD_TYPE)
        tl.store(place, after.to(hidden.dtype.element_ty), mask=inside)
