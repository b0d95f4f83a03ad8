"""Measures a contrast inside the model: activations at the ends of prompts, directions, features."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from torch import Tensor

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.gates.contrast import SIDES, subset
from discovery.gates.gate_data import CONTEXT
from discovery.gates.gate_probe import prompt_end_features
from discovery.gates.refusal_sentences import targets
from discovery.jobs.progress import meter
from discovery.jobs.step_cache import StepCache
from discovery.proposals.activation_readings import answer_features, answer_means, sides
from discovery.proposals.answer.edits import RankedFeature, causal_effects, rank_features
from discovery.proposals.settings import ProposeSettings
from interpretops.artifacts.dictionary import Dictionary


class Evidence:
    """Computes each result once and caches it."""

    def __init__(
        self,
        model: FrozenModel,
        prompts: Mapping[str, Mapping[str, Sequence[str]]],
        wanted: Sequence[str],
        chosen: ProposeSettings,
        cache: StepCache,
    ) -> None:
        """``prompts`` by part and side; ``wanted`` answers, or none for the project's own refusals."""
        self.model, self.prompts, self.wanted = model, prompts, wanted
        self.chosen, self.cache = chosen, cache

    def ends(self, part: str, layer: int) -> dict[str, Tensor]:
        """Activations [N, D] by side at the end of the prompts of a part."""

        def compute() -> dict[str, Tensor]:
            ids = {
                side: [self.model.chat_ids(prompt, CONTEXT) for prompt in prompts]
                for side, prompts in self.prompts[part].items()
            }
            total = sum(len(i) for group in ids.values() for i in group)
            with meter(f"propose: {part} activations", total, "tokens") as progress:
                return {
                    f"{side}/{layer}": prompt_end_features(self.model, group, [layer], progress)[layer]
                    for side, group in ids.items()
                }

        found = self.cache.tensors(f"ends_{part}_{layer}", compute)
        return {side: sides(found, layer, side) for side in SIDES}

    @cached_property
    def _pairs(self) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Formatted target prompts, and for each the wanted answer and the model's own."""
        prompts = subset(self.prompts["discovery"]["target"], self.chosen.pairs, self.chosen.seed)
        ids = [self.model.chat_ids(prompt, CONTEXT) for prompt in prompts]
        texts = self.wanted or targets("")
        wanted = [self.model.text_ids(texts[place % len(texts)]) for place in range(len(ids))]

        def compute() -> list[list[int]]:
            answers: list[list[int]] = []
            with meter("propose: answers to compare", len(ids), "answers") as progress:
                for start in range(0, len(ids), 16):
                    answers += self.model.answers(ids[start : start + 16], self.chosen.answer_tokens)
                    progress.advance(len(ids[start : start + 16]))
            return answers

        own = self.cache.json("own_of_pairs", compute)
        return ids, wanted, [answer or [self.model.pad_id] for answer in own]

    def directions(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Difference of means [D] at each layer: wanted answers minus the model's own."""

        def compute() -> dict[str, Tensor]:
            ids, wanted, own = self._pairs
            with meter("propose: directions", 2 * len(ids), "answers") as progress:
                means = [answer_means(self.model, ids, a, layers, progress) for a in (wanted, own)]
            return {str(layer): (means[0][layer] - means[1][layer]).mean(0) for layer in layers}

        found = self.cache.tensors(f"directions_{'_'.join(map(str, layers))}", compute)
        return {int(layer): vector for layer, vector in found.items()}

    def features(self, dictionary: Dictionary, given: Sequence[int] | None) -> list[RankedFeature]:
        """Features by their effect on wanted answers: the given ones, or those that separate the contrast."""
        for feature in given or ():
            if feature >= dictionary.width:
                raise DiscoveryError(
                    f"feature {feature}: {dictionary.manifest.id} has features 0..{dictionary.width - 1}"
                )

        def compute() -> list[dict[str, Any]]:
            ids, wanted, own = self._pairs
            with meter("propose: features", 2 * len(ids), "answers") as progress:
                active = [answer_features(self.model, dictionary, ids, a, progress) for a in (wanted, own)]
            ranked = rank_features(active[0], active[1], given)
            return [vars(f) for f in causal_effects(self.model, dictionary, ranked, ids, wanted)]

        return [RankedFeature(**entry) for entry in self.cache.json("features", compute)]
