"""The metric that a circuit explains: one number per prompt, from the logits at its last position."""

from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from discovery.circuits.pairs import Pair
from discovery.circuits.search_settings import Metric as Metric

METRICS: tuple[Metric, ...] = get_args(Metric)


def measure(metric: Metric, logits: Tensor, pairs: Sequence[Pair]) -> Tensor:
    """How strongly the model favours each prompt's answer tokens over its wrong ones, [B]; logits [B, V].

    logit_diff   mean logit of the answers minus mean logit of the wrong ones (IOI; refuse minus comply)
    log_odds     log of the probability ratio of the two sets
    prob_diff    probability of the answers minus that of the wrong ones (greater-than, Hanna et al. 2023)
    """
    rows = []
    scaled = logits.float() if metric == "logit_diff" else logits.float().log_softmax(-1)
    for row, pair in zip(scaled, pairs, strict=True):
        right, wrong = row[list(pair.answers)], row[list(pair.wrong)]
        if metric == "logit_diff":
            rows.append(right.mean() - wrong.mean())
        elif metric == "log_odds":
            rows.append(right.logsumexp(0) - wrong.logsumexp(0))
        else:
            rows.append(right.exp().sum() - wrong.exp().sum())
    return torch.stack(rows)
