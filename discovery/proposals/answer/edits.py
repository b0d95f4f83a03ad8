"""Candidate edits behind the gate, at each strength of the grid."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.proposals.activation_readings import feature_auroc
from interpretops.artifacts.dictionary import Dictionary

CAUSAL_CANDIDATES = 24
CAUSAL_PAIRS = 8


@dataclass(frozen=True)
class Action:
    """One edit: its settings, and the interventions without their gate."""

    settings: dict[str, Any]
    interventions: list[dict[str, Any]]
    effort: float
    """The size of the change; of two equally good edits, the smaller one is chosen."""


def direction_actions(
    directions: Mapping[int, Tensor], strengths: Sequence[float], file: str
) -> list[Action]:
    """Edits that add the difference of means at one layer, for each layer and strength."""
    return [
        Action(
            {"layer": layer, "strength": strength},
            [
                {
                    "type": "steering_vector",
                    "selector": {"layer": layer},
                    "vector": {"file": file, "tensor": f"direction.{layer}"},
                    "strength": strength,
                }
            ],
            strength,
        )
        for layer in directions
        for strength in strengths
    ]


@dataclass(frozen=True)
class RankedFeature:
    """A feature, and why it was chosen."""

    id: int
    auroc: float
    """AUROC of its mean activation: wanted answers against the model's own."""
    level: float
    """Its mean activation over the wanted answers in which it is active."""
    difference: float
    """Mean activation along wanted answers minus that along the model's own."""
    causal: float | None = None
    """Gain in wanted answers' log-probability per token if only this feature is held at twice its level."""

    def record(self) -> dict[str, float | int | None]:
        """Plain JSON, rounded."""
        causal = None if self.causal is None else round(self.causal, 5)
        return {
            "id": self.id,
            "auroc": round(self.auroc, 4),
            "level": round(self.level, 3),
            "difference": round(self.difference, 3),
            "causal": causal,
        }


def rank_features(wanted: Tensor, own: Tensor, given: Sequence[int] | None = None) -> list[RankedFeature]:
    """Features [N, F] that separate wanted answers from the model's own, the most discriminating first."""
    auroc = feature_auroc(wanted, own)
    difference = wanted.mean(0) - own.mean(0)
    decoded = difference.clamp(min=0) * (auroc - 0.5).clamp(min=0)
    ids = list(given) if given is not None else decoded.argsort(descending=True).tolist()
    found = [
        RankedFeature(int(f), float(auroc[f]), _level(wanted[:, f]), float(difference[f]))
        for f in ids
        if given is not None or float(decoded[f]) > 0
    ]
    if not found:
        raise DiscoveryError("no feature is more active along wanted answers than along the model's own")
    return found


def _level(active: Tensor) -> float:
    some = active[active > 0]
    return float(some.mean()) if len(some) else 1.0


@torch.no_grad()
def causal_effects(
    model: FrozenModel,
    dictionary: Dictionary,
    ranked: Sequence[RankedFeature],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[RankedFeature]:
    """The first candidates, ordered by the gain of wanted answers if only that feature is held up."""
    pairs = list(zip(prompts, answers, strict=True))[:CAUSAL_PAIRS]
    base = _likelihood(model, pairs, {})
    measured = []
    for feature in ranked[:CAUSAL_CANDIDATES]:
        row = dictionary.encoder_rows([feature.id])
        read, write = (
            torch.from_numpy(row.read[0]),
            torch.from_numpy(dictionary.decoder_rows([feature.id])[0]),
        )
        bias, threshold = float(row.bias[0]), max(float(row.threshold[0]), 0.0)
        goal = 2 * feature.level
        starts = [len(prompt) - 1 for prompt, _ in pairs]

        def edit(
            x: Tensor,
            read: Tensor = read,
            write: Tensor = write,
            bias: float = bias,
            threshold: float = threshold,
            goal: float = goal,
            starts: list[int] = starts,
        ) -> Tensor:
            u = x.float() @ read + bias
            active = torch.where(u > threshold, u, torch.zeros(()))
            lift = (goal - active).clamp(min=0)
            lift = lift * (x.float().norm(dim=-1) <= dictionary.max_norm)
            for sequence, start in enumerate(starts):
                lift[sequence, :start] = 0
            held: Tensor = (x.float() + lift[..., None] * write).to(x.dtype)
            return held

        gain = _likelihood(model, pairs, {dictionary.manifest.layer: edit}) - base
        measured.append(RankedFeature(feature.id, feature.auroc, feature.level, feature.difference, gain))
    return sorted(measured, key=lambda feature: -(feature.causal or 0.0))


def _likelihood(
    model: FrozenModel, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], edits: Mapping[int, Any]
) -> float:
    """Mean log-probability per answer token."""
    tokens, mask = model.pad([[*prompt, *answer] for prompt, answer in pairs])
    with model.edited(edits):
        logits = model.network(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    total, count = 0.0, 0
    for row, (prompt, answer) in enumerate(pairs):
        span = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
        picked = log_softmax(logits[row, span].float(), -1)
        total += float(picked.gather(-1, torch.tensor(list(answer))[:, None]).sum())
        count += len(answer)
    return total / count


def feature_actions(
    dictionary: Dictionary, ranked: Sequence[RankedFeature], counts: Sequence[int], strengths: Sequence[float]
) -> list[Action]:
    """Edits that hold up the first features, each at a multiple of its level along wanted answers."""
    actions = []
    for count in sorted({min(count, len(ranked)) for count in counts}):
        for strength in strengths:
            interventions: list[dict[str, Any]] = []
            for feature in ranked[:count]:
                low = round(strength * feature.level, 2)
                interventions.append(
                    {
                        "type": "feature_clamp",
                        "selector": {
                            "layer": dictionary.manifest.layer,
                            "point": dictionary.manifest.point,
                            "sae_feature_ids": [feature.id],
                            "dictionary": dictionary.manifest.id,
                        },
                        "clamp_range": [low, max(4 * low, 100.0)],
                    }
                )
            actions.append(Action({"features": count, "strength": strength}, interventions, strength * count))
    return actions
