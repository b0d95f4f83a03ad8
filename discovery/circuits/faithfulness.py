"""Faithfulness: how much of a behaviour remains if every edge outside the circuit is ablated."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.graph import Edges
from discovery.circuits.metric import Metric, measure
from discovery.circuits.pairs import Pair, batches, contrast_start, shared_start
from discovery.errors import DiscoveryError
from interpretops.circuit import Ablation, RandomCircuits

SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The shares of the model's edges at which MIB evaluates a circuit (arXiv:2504.13151)."""


class Evaluator:
    """Measures circuits on pairs under one kind of ablation.

    counterfactual  ablated edges carry their source's output on the corrupted prompt
    mean            ablated edges carry the source's mean output over clean and corrupted prompts of the same
                    length, separately for each position (the first position is a sink, unlike the others)
    """

    def __init__(
        self, decoder: GraphDecoder, pairs: Sequence[Pair], metric: Metric, ablation: Ablation, batch: int
    ) -> None:
        self.decoder, self.pairs, self.metric, self.ablation = decoder, pairs, metric, ablation
        self.batches = list(batches(pairs, batch))
        self._starts = self._shared_starts()
        self._means = self._mean_outputs() if ablation == "mean" else {}
        nothing = np.zeros((decoder.graph.size, decoder.graph.size), bool)
        self.full = self._full()
        self.empty = self.metrics([nothing])[0]
        if abs(self.full - self.empty) < 1e-6:
            raise DiscoveryError(
                f"the metric is {self.full:.6g} on clean prompts and {self.empty:.6g} with everything "
                f"ablated ({ablation}): the model shows no contrast that a circuit could carry"
            )

    def metrics(self, circuits: Sequence[Edges]) -> list[float]:
        """The mean metric of each circuit over the pairs."""
        totals = np.zeros(len(circuits))
        for indices in self.batches:
            pairs = [self.pairs[index] for index in indices]
            start = self._start(pairs)
            with self.decoder.behind([pair.clean[:start] for pair in pairs]):
                clean = self.decoder.embed([pair.clean[start:] for pair in pairs])
                reference = self._reference(pairs, start)
                for number, edges in enumerate(circuits):
                    logits = self.decoder.run_circuit(clean, edges, reference)
                    totals[number] += float(measure(self.metric, logits, pairs).sum())
        return [float(total) / len(self.pairs) for total in totals]

    def faithfulness(self, metric: float) -> float:
        """(m(C) - m(empty)) / (m(model) - m(empty)): 1 is the whole model, 0 nothing."""
        return (metric - self.empty) / (self.full - self.empty)

    @torch.no_grad()
    def _full(self) -> float:
        total = 0.0
        for indices in self.batches:
            pairs = [self.pairs[index] for index in indices]
            stream = self.decoder.run(self.decoder.embed([pair.clean for pair in pairs]))[0]
            total += float(measure(self.metric, self.decoder.logits(stream), pairs).sum())
        return total / len(self.pairs)

    def _start(self, pairs: Sequence[Pair]) -> int:
        """The number of leading tokens with the same outputs in every run; they are not run again."""
        if self.ablation == "mean":
            return self._starts[len(pairs[0].clean)]
        return contrast_start(pairs)

    def _shared_starts(self) -> dict[int, int]:
        """For each prompt length, the number of leading tokens that all prompts share."""
        sides: dict[int, list[tuple[int, ...]]] = {}
        for pair in self.pairs:
            sides.setdefault(len(pair.clean), []).extend((pair.clean, pair.corrupted))
        return {length: shared_start(tokens) for length, tokens in sides.items()}

    def _reference(self, pairs: Sequence[Pair], start: int) -> Tensor:
        if self.ablation == "mean":
            return self._means[len(pairs[0].clean)]
        return self._outputs([pair.corrupted[start:] for pair in pairs])

    @torch.no_grad()
    def _outputs(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        outputs = self.decoder.run(self.decoder.embed(tokens), keep=True)[1]
        assert outputs is not None
        return outputs

    def _mean_outputs(self) -> dict[int, Tensor]:
        """For each prompt length, the mean outputs [N-1, 1, T, D] of all nodes after the shared start."""
        sums: dict[int, Tensor] = {}
        counts: dict[int, int] = {}
        for indices in self.batches:
            pairs = [self.pairs[index] for index in indices]
            length = len(pairs[0].clean)
            start = self._starts[length]
            with self.decoder.behind([pair.clean[:start] for pair in pairs]):
                for tokens in ([p.clean[start:] for p in pairs], [p.corrupted[start:] for p in pairs]):
                    added = self._outputs(tokens).sum(1, keepdim=True)
                    sums[length] = sums[length] + added if length in sums else added
                    counts[length] = counts.get(length, 0) + len(tokens)
        return {length: total / counts[length] for length, total in sums.items()}


@dataclass(frozen=True)
class Areas:
    """Areas under the faithfulness curve over circuit sizes."""

    cpr: float
    cmd: float


def areas(sizes: Sequence[float], curve: Sequence[float]) -> Areas:
    """CPR and CMD of a faithfulness curve f over shares k of the model's edges.

    MIB (Mueller et al. 2025, arXiv:2504.13151): CPR = integral of f(C_k) dk, CMD = integral of
    |1 - f(C_k)| dk over k in [0, 1], by the trapezoidal rule between the measured sizes. The curve begins at
    k = 0 with f = 0, because the empty circuit has f = 0 by definition.
    """
    k, f = np.array([0.0, *sizes]), np.array([0.0, *curve])
    return Areas(float(np.trapezoid(f, k)), float(np.trapezoid(np.abs(1 - f), k)))


def random_summary(evaluator: Evaluator, own: float, others: Sequence[Sequence[float]]) -> RandomCircuits:
    """Measures of random circuits; each has its metric at `SIZES` and, last, at the circuit's size."""
    curves = [[evaluator.faithfulness(value) for value in row] for row in others]
    last = np.array([curve[-1] for curve in curves])
    found = [areas(SIZES, [*curve[:-1], 1.0]) for curve in curves]
    cpr, cmd = np.array([area.cpr for area in found]), np.array([area.cmd for area in found])
    distance = abs(1 - evaluator.faithfulness(own))
    return RandomCircuits(
        count=len(others),
        faithfulness_mean=float(last.mean()),
        faithfulness_best=float(last[np.abs(1 - last).argmin()]),
        cpr_mean=float(cpr.mean()),
        cpr_best=float(cpr.max()),
        cmd_mean=float(cmd.mean()),
        cmd_best=float(cmd.min()),
        share_at_least_as_close=float((np.abs(1 - last) <= distance).mean()),
    )
