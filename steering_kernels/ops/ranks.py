"""Reads an activation whose columns are split over ranks: each rank computes part of a sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, bit-identical on each. All ranks must call it, in the same order."""


def project(x: Tensor, matrix_t: Tensor, bias: Tensor, sum_ranks: SumRanks | None) -> Tensor:
    """bias + x [n, D] @ matrix_t [D, K], summed over the columns of all ranks."""
    if sum_ranks is None:
        return torch.addmm(bias, x, matrix_t)
    return sum_ranks(x @ matrix_t) + bias


def norm(x: Tensor, sum_ranks: SumRanks | None) -> Tensor:
    """L2 norm [n] of x [n, D] over the columns of all ranks."""
    if sum_ranks is None:
        length: Tensor = x.norm(dim=1)
        return length
    return sum_ranks(x.square().sum(dim=1)).sqrt()
