"""The fused kernel for decode: one program per token, which covers the width in a few wide steps.

Tokens of a decode step share little work, and memory latency dominates. So a program reads its row in steps
as wide as registers allow and reduces once at the end. A token's result does not depend on its batch. Sums in
float32. A row's first `CHUNK` units stay in registers; the strengths of further units pass through ``spill``.
"""

# Triton's language is not typed:
# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,misc"

from __future__ import annotations

import triton
import triton.language as tl

from steering_kernels.ops.triton_units import stream_at, unit_delta


@triton.jit(do_not_specialize=["tokens"])
def edit_tokens(
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
    CHUNK: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(row_of_token + token)
    if row == 0:
        return
    first = tl.load(start + row)
    units = tl.load(count + row)
    first_scale = tl.load(scale_start + row)
    scales = tl.load(scale_count + row)
    ks = tl.arange(0, CHUNK)
    gates = gate_open + token * gate_stride

    # The common case: no gate is open, so nothing is read.
    opened = 0
    encoder = -1
    for chunk in range(0, units, CHUNK):
        live = chunk + ks < units
        encoder = tl.maximum(encoder, tl.max(tl.load(topk + first + chunk + ks, mask=live, other=-1), axis=0))
        column = tl.load(gate + first + chunk + ks, mask=live, other=0)
        is_open = tl.load(gates + column, mask=live, other=0).to(tl.int32)
        opened = tl.maximum(opened, tl.max(is_open, axis=0))
    scaled = 0
    for index in range(scales):
        is_open = tl.load(gates + tl.load(scale_gate + first_scale + index)).to(tl.int32)
        scaled = tl.maximum(scaled, is_open)
    if (opened + scaled == 0) | (encoder >= 0):
        return

    # Read: u = read . x + bias, and each unit's strength g.
    g0 = tl.zeros([1, CHUNK], tl.float32)
    touched = scaled
    for chunk in range(0, units, CHUNK):
        k = first + chunk + ks
        live = chunk + ks < units
        sums = tl.zeros([CHUNK, BLOCK], tl.float32)
        squares = tl.zeros([BLOCK], tl.float32)
        for begin in tl.static_range(0, READ_WIDTH, BLOCK):
            d = begin + tl.arange(0, BLOCK)
            inside = d < READ_WIDTH
            place, other_place = token * stream_stride + d, token * summand_stride + d
            x = stream_at(stream, summand, place, other_place, inside, HAS_RESIDUAL, ADD_TYPE)
            weight = tl.load(
                read + k[:, None].to(tl.int64) * READ_WIDTH + d[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            sums += x[None, :] * weight
            squares += x * x
        u = tl.sum(sums, axis=1)[None, :]
        norm = tl.sqrt(tl.sum(squares, axis=0))
        g = unit_delta(u, k, live, bias, threshold, gain, offset, low, high)
        acts = tl.load(gates + tl.load(gate + k, mask=live, other=0), mask=live, other=0) != 0
        acts &= norm <= tl.load(max_norm + k, mask=live, other=0.0)
        g = tl.where(acts[None, :], g, 0.0)
        touched = tl.maximum(touched, tl.max(tl.max((g != 0.0).to(tl.int32), axis=1), axis=0))
        if chunk == 0:
            g0 = g
        else:
            tl.store(spill + token * spill_stride + (chunk + ks)[None, :], g, mask=live[None, :])
    if units > CHUNK:
        tl.debug_barrier()  # other threads of this program read the spilled values

    # Write: tokens that no unit touches are not stored, so they stay bit-identical.
    if touched == 0:
        return
    tl.atomic_add(edited + tl.load(slot_of_token + token), tl.full([], 1, tl.int64), sem="relaxed")
    strength = tl.reshape(g0, [CHUNK])
    for begin in tl.static_range(0, WIDTH, BLOCK):
        d = begin + tl.arange(0, BLOCK)
        inside = d < WIDTH
        weight = tl.load(
            write + (first + ks)[:, None].to(tl.int64) * WIDTH + d[None, :],
            mask=(ks < units)[:, None] & inside[None, :],
            other=0.0,
        )
        delta = tl.sum(strength[:, None] * weight, axis=0)
        for chunk in range(CHUNK, units, CHUNK):
            live = chunk + ks < units
            g = tl.load(spill + token * spill_stride + chunk + ks, mask=live, other=0.0)
            weight = tl.load(
                write + (first + chunk + ks)[:, None].to(tl.int64) * WIDTH + d[None, :],
                mask=live[:, None] & inside[None, :],
                other=0.0,
            )
            delta += tl.sum(g[:, None] * weight, axis=0)
        if scales > 0:
            read_place, sum_place = token * stream_stride + d, token * summand_stride + d
            x = stream_at(stream, summand, read_place, sum_place, inside, HAS_RESIDUAL, ADD_TYPE)
            for index in range(scales):
                is_open = tl.load(gates + tl.load(scale_gate + first_scale + index)) != 0
                factor = tl.load(scale + (first_scale + index) * WIDTH + d, mask=inside, other=0.0)
                delta += tl.where(is_open, x * factor, 0.0)
        target = hidden + token * hidden_stride + d
        before = tl.load(target, mask=inside, other=0.0)
        after = before.to(ADD_TYPE) + delta.to(ADD_TYPE)
        tl.store(target, after.to(hidden.dtype.element_ty), mask=inside)
