"""Reading an activation whose columns are split over ranks: what each reads is a part of a sum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SumRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, the same bits on each. All must come to it, in the same order."""


def project(x: Tensor, matrix_t: Tensor, bias: Tensor, sum_ranks: SumRanks | None) -> Tensor:
    """bias + x [n, D] @ matrix_t [D, K] over the columns of all ranks."""
    if sum_ranks is None:
        return torch.addmm(bias, x, matrix_t)
    return sum_ranks(x @ matrix_t) + bias


def norm(x: Tensor, sum_ranks: SumRanks | None) -> Tensor:
    """Length [n] of x [n, D] over the columns of all ranks."""
    if sum_ranks is None:
        length: Tensor = x.norm(dim=1)
        return length
    return sum_ranks(x.square().sum(dim=1)).sqrt()
