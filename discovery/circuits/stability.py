"""Circuit Stability: how alike circuits of resampled data are, beside what chance alone gives."""

from collections.abc import Sequence
from itertools import combinations
from math import exp, lgamma

import numpy as np
import numpy.typing as npt

from discovery.circuits.graph import Edges

Members = npt.NDArray[np.bool_]


def mean_jaccard(sets: Sequence[Members]) -> float:
    """Mean of |A and B| / |A or B| over all pairs of sets; two empty sets are alike (1)."""
    assert len(sets) > 1, "one set has nothing to be like"
    found = []
    for one, other in combinations(sets, 2):
        union = int((one | other).sum())
        found.append(int((one & other).sum()) / union if union else 1.0)
    return float(np.mean(found))


def chance_jaccard(total: int, size: int, other: int) -> float:
    """Expected Jaccard of two sets drawn uniformly from ``total`` elements, exactly.

    The overlap i is hypergeometric: E[J] = sum_i P(i) i / (size + other - i).
    """
    if size + other == 0:
        return 1.0
    found = 0.0
    for overlap in range(max(0, size + other - total), min(size, other) + 1):
        log_ways = (
            _log_choose(size, overlap)
            + _log_choose(total - size, other - overlap)
            - _log_choose(total, other)
        )
        found += exp(log_ways) * overlap / (size + other - overlap)
    return min(found, 1.0)


def mean_chance(total: int, sizes: Sequence[int]) -> float:
    """Mean of `chance_jaccard` over all pairs of sets of these sizes."""
    known: dict[tuple[int, int], float] = {}
    found = []
    for one, other in combinations(sorted(sizes), 2):
        if (one, other) not in known:
            known[one, other] = chance_jaccard(total, one, other)
        found.append(known[one, other])
    return float(np.mean(found))


def inner_nodes(edges: Edges) -> Members:
    """Which heads and MLPs a circuit uses; ``input`` and ``logits``, which all have, are not counted."""
    used: Members = np.logical_or.reduce(edges, axis=0) | np.logical_or.reduce(edges, axis=1)
    return used[1:-1]


def resample(count: int, seed: int, draw: int) -> npt.NDArray[np.int64]:
    """Indices of pairs: a seed takes four fifths of them, each draw is a bootstrap resample of those."""
    part = np.random.default_rng(seed).permutation(count)[: max(1, -(-4 * count // 5))]
    return np.random.default_rng([seed, draw]).choice(part, len(part), replace=True)


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
