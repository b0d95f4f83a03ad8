"""Compares texts: BLEU and chrF as sacrebleu computes them, and whether an answer contains the right one."""

import re
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from interpretops.riskcard.card import Interval, Measure, Source
from interpretops.riskcard.intervals import clopper_pearson, percentiles
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
    """Whether the answer contains the reference's words in order, ignoring case and punctuation."""
    wanted = " ".join(_WORDS.findall(reference.lower()))
    return bool(wanted) and f" {wanted} " in f" {' '.join(_WORDS.findall(answer.lower()))} "


def bleu(answers: Sequence[str], references: Sequence[str], data: Sequence[Source]) -> Measure:
    """Corpus BLEU from 0 to 1, with sacrebleu's bootstrap interval over answers."""
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


def bleu_loss(
    before: Sequence[str], after: Sequence[str], references: Sequence[str], data: Sequence[Source], seed: int
) -> Measure:
    """(BLEU_unsteered - BLEU_steered) / BLEU_unsteered on the same tasks; negative where the policy gains.

    The interval is a paired bootstrap over tasks. If no answer changed, it would have no width. Then the
    upper bound is the Clopper-Pearson bound of 0 changed answers of n: no more answers can have lost.
    """
    if len(references) < 2:
        return absent("the suite has no source with role task")
    parts = np.array([_parts(answers, references) for answers in (before, after)])  # [2, n, parts]
    off, on = (_bleu(arm.sum(0)) for arm in parts)
    if off == 0:
        return absent("BLEU is 0 without the policy, so that nothing can be lost")
    value = 1 - on / off
    chance, drawn = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        chosen = chance.integers(0, len(references), size=len(references))
        one, other = (_bleu(arm[chosen].sum(0)) for arm in parts)
        if one > 0:
            drawn.append(1 - other / one)
    low, high = percentiles(np.array(drawn))
    if list(before) == list(after):
        high = max(high, clopper_pearson(0, len(references))[1])
    interval = Interval(low=min(low, value), high=max(high, value), method="bootstrap")
    return Measure(value=value, n=len(references), interval=interval, seeds=(seed,), data=tuple(data))


def _parts(answers: Sequence[str], references: Sequence[str]) -> list[list[int]]:
    """BLEU's counts for each answer: matching n-grams, all n-grams, and both lengths."""
    scorer, found = BLEU(effective_order=False), []
    for answer, reference in zip(answers, references, strict=True):
        score = scorer.corpus_score([answer], [[reference]])
        found.append([*score.counts, *score.totals, score.sys_len, score.ref_len])
    return found


def _bleu(parts: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]") -> float:
    """Corpus BLEU from 0 to 1, from the summed counts."""
    counts, totals = [int(part) for part in parts[:4]], [int(part) for part in parts[4:8]]
    lengths = int(parts[8]), int(parts[9])
    return min(1.0, float(BLEU.compute_bleu(counts, totals, *lengths, smooth_method="exp").score) / 100)
