"""Confidence intervals: exact for rates, bootstrap for means and paired ratios."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 10_000
NOTCH = 1.57
"""McGill, Tukey and Larsen (1978): median +- 1.57 IQR / sqrt(n) holds the true median in about 95 %."""
_CHUNK = 500
_BISECTIONS = 60


@cache
def clopper_pearson(successes: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval of a rate (Clopper and Pearson, 1934).

    low solves P(X >= successes | low) = (1 - confidence) / 2, high P(X <= successes | high) = the same,
    with X binomial of n trials.
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} of {n} is no rate")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else _solve(range(successes, n + 1), n, tail, rising=True)
    high = 1.0 if successes == n else _solve(range(successes + 1), n, tail, rising=False)
    return low, high


def _solve(counts: range, n: int, tail: float, *, rising: bool) -> float:
    """The p at which the counts have the probability ``tail``, by bisection."""
    chosen = np.arange(counts.start, counts.stop, dtype=np.float64)
    ways = np.array(
        [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in counts], dtype=np.float64
    )
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        logs = ways + chosen * math.log(middle) + (n - chosen) * math.log1p(-middle)
        if (float(np.exp(logs).sum()) < tail) == rising:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def bootstrap_mean(
    values: Sequence[float], weights: Sequence[float] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of a (weighted) mean: resamples the items with replacement."""
    given = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(given) if weights is None else np.asarray(weights, dtype=np.float64)
    if given.size < 2 or weight.shape != given.shape or not weight.min() > 0:
        raise ValueError("a bootstrap needs at least two values, each with a positive weight")
    chance = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = chance.integers(0, given.size, size=(_CHUNK, given.size))
        means.append((given * weight)[drawn].sum(1) / weight[drawn].sum(1))
    return percentiles(np.concatenate(means))


def bootstrap_ratio(
    both: int, only_off: int, only_on: int, neither: int, *, seed: int
) -> tuple[float, float]:
    """Paired bootstrap of 1 - (both + only_on) / (both + only_off): resamples whole pairs.

    Resamples without any event in the denominator are skipped.
    """
    cells = np.array([both, only_off, only_on, neither], dtype=np.float64)
    drawn = np.random.default_rng(seed).multinomial(int(cells.sum()), cells / cells.sum(), size=RESAMPLES)
    off, on = drawn[:, 0] + drawn[:, 1], drawn[:, 0] + drawn[:, 2]
    return percentiles(1 - on[off > 0] / off[off > 0])


def bootstrap_shares(
    whole: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
    parts: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]",
    *,
    drawn_parts: bool,
    seed: int,
) -> tuple[list[tuple[float, float]], tuple[float, float], float]:
    """Percentile bootstrap of sum(parts[c]) / sum(whole) and of the mean of these shares over c.

    whole  [n], parts [C, n]: the same n items, which are resampled; with ``drawn_parts`` the C parts are
    resampled too, for the mean only

    Returns the bounds of each share, the bounds of their mean, and the lower bound of sum(whole) / n. If
    that bound is not positive, the shares are meaningless.
    """
    chance = np.random.default_rng(seed)
    n, count = len(whole), len(parts)
    times = chance.multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(np.float64)  # [resamples, n]
    totals = times @ whole
    smallest = float(np.percentile(totals / n, 100 * (1 - CONFIDENCE) / 2))
    if smallest <= 0:
        return [], (0.0, 0.0), smallest
    used = totals > 0
    shares = (times[used] @ parts.T) / totals[used, None]  # [resamples, C]
    weights = np.full((len(shares), count), 1 / count)
    if drawn_parts:
        weights = chance.multinomial(count, np.full(count, 1 / count), size=len(shares)) / count
    means = (shares * weights).sum(1)
    return [percentiles(column) for column in shares.T], percentiles(means), smallest


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    lower, median, upper = (float(value) for value in np.percentile(values, [25, 50, 75]))
    return lower, median, upper


def notch(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower bound, value and upper bound of a median."""
    lower, median, upper = quartiles(values)
    margin = NOTCH * (upper - lower) / math.sqrt(len(values))
    return median - margin, median, median + margin


def percentiles(values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> tuple[float, float]:
    """The bounds that exclude 2.5 % of the values on each side."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
