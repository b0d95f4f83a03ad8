"""The pointwise part of the op, shared by both Triton kernels."""

# Triton's language is not typed:
# mypy: disable-error-code="no-untyped-call,no-untyped-def,untyped-decorator,misc"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unit_delta(u, k, live, bias, threshold, gain, offset, low, high):
    """Strength g [N, K] of the units, before gates and norm bounds, from u [N, K]."""
    u += tl.load(bias + k, mask=live, other=0.0)[None, :]
    a = tl.where(u > tl.load(threshold + k, mask=live, other=0.0)[None, :], u, 0.0)
    clipped = tl.minimum(
        tl.maximum(a, tl.load(low + k, mask=live, other=0.0)[None, :]),
        tl.load(high + k, mask=live, other=0.0)[None, :],
    )
    g = a * tl.load(gain + k, mask=live, other=0.0)[None, :]
    g += tl.load(offset + k, mask=live, other=0.0)[None, :]
    return g + (clipped - a)


@triton.jit
def stream_at(
    stream,
    summand,
    place,
    other_place,
    mask,
    HAS_RESIDUAL: tl.constexpr,  # noqa: N803  # Triton's way to write constants
    ADD_TYPE: tl.constexpr,  # noqa: N803
):
    """The activation to read, in float32. A sum is first rounded to the model's dtype, as in the model."""
    x = tl.load(stream + place, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        y = tl.load(summand + other_place, mask=mask, other=0.0)
        x = (x.to(ADD_TYPE) + y.to(ADD_TYPE)).to(x.dtype)
    return x.to(tl.float32)
