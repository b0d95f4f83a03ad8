"""The learned edit of a class to avoid: the model, distilled from itself with the unwanted words struck out.

ReLU rows at a few layers, ``x' = x + B relu(A x + b)``, act on every token without gate or state. At each
position the goal is the model's own distribution with the probability of unwanted tokens divided by
`STRIKE` and the rest scaled up; where none are likely, that is the model itself. Loss: KL divergence to it.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from discovery.frozen_model import FrozenModel
from discovery.gates.gate_probe import Probe
from discovery.gates.low_rank import LowRankRows
from discovery.jobs.checksummed_file import digest
from discovery.jobs.progress import meter
from discovery.jobs.training_checkpoint import restore_checkpoint, save_checkpoint
from discovery.proposals.avoid.answer_trait import Sampled

STRIKE = 50.0
TRAIT_WEIGHT = 8.0
"""Weight of positions at which the goal differs from the model by more than `NEAR`."""
NEAR = 0.02


@dataclass(frozen=True)
class StruckSettings:
    """What decides the learned edit, apart from data and model."""

    layers: tuple[int, ...]
    rank: int = 8
    steps: int = 150
    batch: int = 3
    """Sequences with the trait, without it, and of benign text, of each as many, in a step."""
    learning_rate: float = 5e-3
    seed: int = 0


def start(model: FrozenModel, settings: StruckSettings, probes: dict[int, Probe], cuts: dict[int, float],
          norms: dict[int, float], bounds: dict[int, float]) -> LowRankRows:  # fmt: skip
    """Fresh rows; the first of each layer begins as the layer's probe, firing above its cut."""
    edit = LowRankRows(model.spec.hidden_size, settings.rank, norms, settings.seed, bounds=bounds)
    with torch.no_grad():
        for layer in settings.layers:
            edit.a[str(layer)][0] = probes[layer].direction * norms[layer]
            edit.bias[str(layer)][0] = probes[layer].bias - cuts[layer]
    return edit


def struck_goal(
    logits: Tensor, words: Tensor, extra: Sequence[tuple[int, int, int]]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T, V] of the goal, and [B, T] how much probability was struck.

    ``words`` are struck everywhere; ``extra`` names (sequence, position, token) that are struck there alone.
    """
    own = log_softmax(logits.float(), -1)
    struck = own.clone()
    struck[..., words] -= float(torch.tensor(STRIKE).log())
    for sequence, position, token in extra:
        struck[sequence, position, token] = own[sequence, position, token] - float(torch.tensor(STRIKE).log())
    left = struck.logsumexp(-1, keepdim=True)
    return struck - left, 1 - left[..., 0].exp()


def loss_of(model: FrozenModel, edit: LowRankRows, samples: Sequence[Sampled], words: Tensor) -> Tensor:
    """Mean KL divergence of the goal from the edited model, positions with struck words weighing more."""
    tokens, mask = model.pad([sample.ids for sample in samples])
    extra = [
        (row, len(s.prompt) - 1 + s.begins, s.answer[s.begins])
        for row, s in enumerate(samples)
        if s.begins is not None
    ]
    with torch.no_grad():
        own = model.network(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        goal, struck = struck_goal(own, words, extra)
    with model.edited({int(layer): edit.at(int(layer)) for layer in edit.a}):
        logits = model.network(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    edit.firing.clear()
    divergence = kl_div(log_softmax(logits.float(), -1), goal, log_target=True, reduction="none").sum(-1)
    weight = mask * torch.where(struck > NEAR, TRAIT_WEIGHT, 1.0)
    weight[:, 0] = 0
    return (divergence * weight).sum() / weight.sum()


def train_struck(
    model: FrozenModel,
    edit: LowRankRows,
    groups: Sequence[Sequence[Sampled]],
    words: Sequence[int],
    settings: StruckSettings,
    checkpoint: Path,
    identity: Any,
    tick: Callable[[int], object] = int,
) -> LowRankRows:
    """Train, or go on from ``checkpoint``; ``groups`` are sampled from in equal numbers.

    ``identity`` is that of the run. The checkpoint is bound to it, and to all that is trained on besides.
    ``tick`` hears of every finished step, before it is kept.
    """
    optimizer = torch.optim.Adam(edit.parameters(), lr=settings.learning_rate)
    of = [identity, asdict(settings), [asdict(sample) for group in groups for sample in group], list(words)]
    of += [model.spec.fingerprint, digest([value.detach().flatten().tolist() for value in edit.parameters()])]
    step = restore_checkpoint(edit, optimizer, checkpoint, of)
    struck = torch.tensor(list(words), dtype=torch.long)
    with meter("propose: edit", settings.steps, "steps", step) as progress:
        while step < settings.steps:
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * min(
                    1.0, (step + 1) / 10, 2 * (1 - step / settings.steps)
                )
            chance = random.Random(settings.seed * 1_000_003 + step)  # noqa: S311 (sampling)
            chosen = [
                sample for group in groups for sample in chance.sample(group, min(settings.batch, len(group)))
            ]
            loss = loss_of(model, edit, chosen, struck)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(edit.parameters(), 1.0)
            optimizer.step()
            step += 1
            tick(step)
            progress.advance(1, f"loss {loss.item():.4f}")
            if step % 10 == 0 or step == settings.steps:
                save_checkpoint(edit, optimizer, checkpoint, of, step)
    return edit
