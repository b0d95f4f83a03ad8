"""The feature part of a search: which features carry the contrast, how much of it, and how stably."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from discovery.circuits.features import FeatureSite, feature_effects, feature_scores
from discovery.circuits.metric import Metric
from discovery.circuits.pairs import Pair, batches
from discovery.circuits.stability import Members, mean_chance, mean_jaccard, resample
from discovery.errors import DiscoveryError
from discovery.jobs.progress import meter
from discovery.jobs.step_cache import StepCache, numbers
from interpretops.circuit import CircuitDictionary, CircuitNode


@dataclass(frozen=True)
class FeatureSettings:
    """What a search measures for each dictionary."""

    metric: Metric
    steps: int
    seeds: tuple[int, ...]
    resamples: int
    random_sets: int
    batch: int
    most: int
    """Number of features, ranked by attribution, whose exact contribution is measured."""


class FeatureSearch:
    """Searches one dictionary: chooses features on the discovery pairs, measures on the evaluation pairs.

    Step names include the hash of the dictionary's weights, so a retrained dictionary starts afresh.
    """

    def __init__(
        self,
        site: FeatureSite,
        discovery: Sequence[Pair],
        evaluation: Sequence[Pair],
        settings: FeatureSettings,
        steps: StepCache,
    ) -> None:
        self.site, self.discovery, self.evaluation = site, discovery, evaluation
        self.settings, self.steps = settings, steps
        self.name = f"{site.manifest.id}-{site.manifest.weights.sha256[:12]}"

    def run(self, contrast: float) -> tuple[list[CircuitNode], CircuitDictionary]:
        """The nodes of features, strongest attribution first, then the error's, and the dictionary's record.

        contrast: mean M(clean) - M(corrupted) over the evaluation pairs; contributions are shares of it
        """
        scores = self._attribute()
        mean = scores.mean(0).double().numpy()
        active = np.flatnonzero((scores[:, :-1] != 0).any(0).numpy())
        named = _strongest(mean[:-1], active, self.settings.most)
        random = [self._random(active, len(named), number) for number in range(self.settings.random_sets)]
        effects = [effect / contrast for effect in self._effects(named, random)]
        singles, rest = effects[: len(named)], effects[len(named) :]
        joint, drawn, everything, error = rest[0], rest[1:-2], rest[-2], rest[-1]
        layer, dictionary = self.site.manifest.layer, self.site.manifest.id
        nodes = [
            CircuitNode(
                id=f"f{layer}.{feature}",
                kind="feature",
                layer=layer,
                feature=feature,
                dictionary=dictionary,
                score=float(mean[feature]),
                ccs=ccs,
            )
            for feature, ccs in zip(named, singles, strict=True)
        ]
        nodes.append(
            CircuitNode(
                id=f"e{layer}",
                kind="error",
                layer=layer,
                dictionary=dictionary,
                score=float(mean[-1]),
                ccs=error,
            )
        )
        sets = self._resampled(scores)
        return nodes, CircuitDictionary(
            id=dictionary,
            layer=layer,
            width=self.site.manifest.width,
            weights_sha256=self.site.manifest.weights.sha256,
            active=len(active),
            score_features=float(mean[:-1].sum()),
            score_error=float(mean[-1]),
            ccs_all=everything,
            ccs_named=joint,
            random_sets=len(drawn),
            ccs_random_mean=float(np.mean(drawn)),
            ccs_random_best=max(drawn, key=abs),
            jaccard=mean_jaccard(sets),
            chance=mean_chance(len(active), [int(found.sum()) for found in sets]),
        )

    def _attribute(self) -> Tensor:
        """Scores [P, F + 1] of every pair and feature, and of the error; one file per batch."""
        scores = torch.zeros(len(self.discovery), self.site.manifest.width + 1)
        with meter(f"search: features of {self.site.manifest.id}", len(self.discovery), "pairs") as progress:
            for number, indices in enumerate(batches(self.discovery, self.settings.batch)):
                pairs = [self.discovery[index] for index in indices]
                part = partial(feature_scores, self.site, pairs, self.settings.metric, self.settings.steps)
                found = self.steps.tensor(f"{self.name}-scores-{number:04d}", part)
                if not bool(torch.isfinite(found).all()):
                    raise DiscoveryError(
                        f"dictionary {self.site.manifest.id}: attribution of pairs {list(indices)} is not "
                        "finite; check its weights"
                    )
                scores[indices] = found
                progress.advance(len(indices))
        return scores

    def _effects(self, named: Sequence[int], random: Sequence[Sequence[int]]) -> list[float]:
        """Mean exact effects: each chosen feature, all chosen, each random set, every feature, the error."""
        groups = [*([feature] for feature in named), named, *random]

        def compute() -> list[float]:
            total = torch.zeros(len(groups) + 2)
            with meter("search: features' contributions", len(self.evaluation), "pairs") as progress:
                for indices in batches(self.evaluation, self.settings.batch):
                    pairs = [self.evaluation[index] for index in indices]
                    total += feature_effects(self.site, pairs, self.settings.metric, groups).sum(0)
                    progress.advance(len(indices))
            return [float(value) for value in total / len(self.evaluation)]

        return self.steps.json(f"{self.name}-effects-{self.settings.most}-{len(random)}", compute, numbers)

    def _random(self, active: npt.NDArray[np.int64], size: int, number: int) -> list[int]:
        drawn = np.random.default_rng([self.settings.seeds[0], number]).choice(active, size, replace=False)
        return [int(feature) for feature in drawn]

    def _resampled(self, scores: Tensor) -> list[Members]:
        """The features that each resample of the pairs would choose, resampled as for circuits of edges."""
        found = []
        for seed in self.settings.seeds:
            for draw in range(self.settings.resamples):
                chosen = scores[torch.from_numpy(resample(len(scores), seed, draw)), :-1]
                members = np.zeros(chosen.shape[1], bool)
                active = np.flatnonzero((chosen != 0).any(0).numpy())
                members[_strongest(chosen.mean(0).double().numpy(), active, self.settings.most)] = True
                found.append(members)
        return found


def _strongest(scores: npt.NDArray[np.float64], among: npt.NDArray[np.int64], most: int) -> list[int]:
    order = among[np.argsort(-np.abs(scores[among]), kind="stable")]
    return [int(feature) for feature in order[:most]]
