"""The source that a policy harms most. A mean over sources hides one that is refused every time."""

from dataclasses import dataclass

from interpretops.riskcard.measure import Measure, Source
from interpretops.riskcard.measures import new_failures

LEAST = 100
"""Prompts that a source needs to be judged by itself: with fewer, no bound is below 3.6 %."""


@dataclass(frozen=True)
class SourceRate:
    """New failures among the prompts of one source."""

    name: str
    n: int
    """Prompts that are answered normally without the policy."""
    value: float
    high: float
    """Upper 95 % bound."""


def source_rates(measure: Measure) -> list[SourceRate]:
    """Each source of CD or over-refusal that has at least `LEAST` prompts, the worst bound first."""
    found = []
    for source in measure.data:
        rate = _rate(source)
        if rate is not None and source.n >= LEAST:
            found.append(rate)
    return sorted(found, key=lambda rate: (-rate.high, rate.name))


def small_sources(measure: Measure) -> list[Source]:
    """The sources with too few prompts to be judged by themselves."""
    return [source for source in measure.data if source.n < LEAST]


def _rate(source: Source) -> SourceRate | None:
    if source.pairs is None:
        return None
    measured = new_failures(source.pairs)
    if measured.interval is None or measured.value is None or measured.n is None:
        return None
    return SourceRate(source.name, measured.n, measured.value, measured.interval.high)
