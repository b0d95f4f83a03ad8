"""Scores of one text against another: BLEU and chrF as sacrebleu computes them, and containing an answer."""

import re
from collections.abc import Sequence

from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from interpretops.riskcard.card import Interval, Measure, Source
from interpretops.riskcard.measures import absent

RESAMPLES = 1000
_WORDS = re.compile(r"[^\W_]+")


def similarity(answer: str, other: str) -> float:
    """chrF of an answer against another, from 0 to 1: the overlap of their letter sequences."""
    if answer == other:
        return 1.0
    if not answer.strip() or not other.strip():
        return 0.0
    return min(1.0, float(CHRF().sentence_score(answer, [other]).score) / 100)


def contains_answer(answer: str, reference: str) -> bool:
    """Whether the reference's words stand in the answer, in their order, whatever their case and signs."""
    wanted = " ".join(_WORDS.findall(reference.lower()))
    return bool(wanted) and f" {wanted} " in f" {' '.join(_WORDS.findall(answer.lower()))} "


def bleu(answers: Sequence[str], references: Sequence[str], data: Sequence[Source]) -> Measure:
    """Corpus BLEU from 0 to 1, its interval by sacrebleu's bootstrap over answers."""
    if len(answers) < 2:
        return absent("the suite has no source with role task")
    found = BLEU(effective_order=False).corpus_score(answers, [references], n_bootstrap=RESAMPLES)
    value = min(1.0, found.score / 100)
    middle, margin = found._mean / 100, found._ci / 100
    interval = Interval(
        low=max(0.0, min(middle - margin, value)),
        high=min(1.0, max(middle + margin, value)),
        method="bootstrap",
    )
    return Measure(value=value, n=len(answers), interval=interval, data=tuple(data))
