"""Circuit Stability: how similar circuits of resampled data are, compared with chance."""

from collections.abc import Sequence
from itertools import combinations
from math import exp, lgamma

import numpy as np
import numpy.typing as npt

from discovery.circuits.graph import Edges

Members = npt.NDArray[np.bool_]
BOOTSTRAPS = 10_000


def jaccard_matrix(sets: Sequence[Members]) -> npt.NDArray[np.float64]:
    """|A and B| / |A or B| of every two sets; 1 for two empty sets."""
    alike = np.ones((len(sets), len(sets)))
    for one, other in combinations(range(len(sets)), 2):
        union = int((sets[one] | sets[other]).sum())
        shared = int((sets[one] & sets[other]).sum())
        alike[one, other] = alike[other, one] = shared / union if union else 1.0
    return alike


def mean_jaccard(sets: Sequence[Members]) -> float:
    """Mean Jaccard similarity over all pairs of sets."""
    assert len(sets) > 1, "needs at least two sets"
    return float(jaccard_matrix(sets)[np.triu_indices(len(sets), 1)].mean())


def jaccard_interval(sets: Sequence[Members], seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap of `mean_jaccard` over resampled sets.

    A set drawn twice is not compared with itself, which would count as perfect similarity. The interval
    covers other resamples of the same pairs, not other pairs.
    """
    alike, chance, means = jaccard_matrix(sets), np.random.default_rng(seed), []
    for _ in range(BOOTSTRAPS):
        drawn = chance.integers(0, len(sets), len(sets))
        apart = drawn[:, None] != drawn[None, :]
        if apart.any():
            means.append(float(alike[np.ix_(drawn, drawn)][apart].mean()))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


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
    """The heads and MLPs that a circuit uses, without ``input`` and ``logits``, which every circuit has."""
    used: Members = np.logical_or.reduce(edges, axis=0) | np.logical_or.reduce(edges, axis=1)
    return used[1:-1]


def resample(count: int, seed: int, draw: int) -> npt.NDArray[np.int64]:
    """Indices of pairs: the seed selects four fifths of them, and each draw bootstraps from those."""
    part = np.random.default_rng(seed).permutation(count)[: max(1, -(-4 * count // 5))]
    return np.random.default_rng([seed, draw]).choice(part, len(part), replace=True)


def _log_choose(n: int, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
