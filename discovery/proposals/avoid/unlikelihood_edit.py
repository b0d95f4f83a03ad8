"""The learned edit of a class to avoid: the model distilled from itself, with unwanted words made unlikely.

ReLU rows at a few layers, ``x' = x + B relu(A x + b)``, act on every token without gate or state. The target
at each position is the model's own distribution, with the probability of unwanted tokens divided by
`SUPPRESSION` and the rest scaled up. Where none are likely, that is the model itself. The loss is the KL
divergence to the target.
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

SUPPRESSION = 50.0
TRAIT_WEIGHT = 8.0
"""Weight of positions at which more than `NEAR` of the probability is suppressed."""
NEAR = 0.02


@dataclass(frozen=True)
class UnlikelihoodSettings:
    """What determines the learned edit, apart from data and model."""

    layers: tuple[int, ...]
    rank: int = 8
    steps: int = 150
    batch: int = 3
    """Sequences of each group (with the trait, without it, benign answers, benign text) in a step."""
    learning_rate: float = 5e-3
    seed: int = 0


def initial_rows(
    model: FrozenModel,
    settings: UnlikelihoodSettings,
    probes: dict[int, Probe],
    cuts: dict[int, float],
    norms: dict[int, float],
    bounds: dict[int, float],
) -> LowRankRows:
    """Untrained rows; the first of each layer starts as the layer's probe, firing above its cut."""
    edit = LowRankRows(model.spec.hidden_size, settings.rank, norms, settings.seed, bounds=bounds)
    with torch.no_grad():
        for layer in settings.layers:
            edit.a[str(layer)][0] = probes[layer].direction * norms[layer]
            edit.bias[str(layer)][0] = probes[layer].bias - cuts[layer]
    return edit


def target_distribution(
    logits: Tensor, words: Tensor, extra: Sequence[tuple[int, int, int]]
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T, V] of the target, and [B, T] how much probability was taken away.

    ``words`` are suppressed everywhere; ``extra`` names (sequence, position, token) to suppress only there.
    """
    own, nats = log_softmax(logits.float(), -1), float(torch.tensor(SUPPRESSION).log())
    lowered = own.clone()
    lowered[..., words] -= nats
    for sequence, position, token in extra:
        lowered[sequence, position, token] = own[sequence, position, token] - nats
    left = lowered.logsumexp(-1, keepdim=True)
    return lowered - left, 1 - left[..., 0].exp()


def loss_of(model: FrozenModel, edit: LowRankRows, samples: Sequence[Sampled], words: Tensor) -> Tensor:
    """Mean KL divergence of the target from the edited model; positions with unwanted words weigh more."""
    tokens, mask = model.pad([sample.ids for sample in samples])
    extra = [
        (row, len(s.prompt) - 1 + s.begins, s.answer[s.begins])
        for row, s in enumerate(samples)
        if s.begins is not None
    ]
    with torch.no_grad():
        own = model.network(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        target, suppressed = target_distribution(own, words, extra)
    with model.edited({int(layer): edit.at(int(layer)) for layer in edit.a}):
        logits = model.network(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    edit.firing.clear()
    divergence = kl_div(log_softmax(logits.float(), -1), target, log_target=True, reduction="none").sum(-1)
    weight = mask * torch.where(suppressed > NEAR, TRAIT_WEIGHT, 1.0)
    weight[:, 0] = 0
    return (divergence * weight).sum() / weight.sum()


def train_edit(
    model: FrozenModel,
    edit: LowRankRows,
    groups: Sequence[Sequence[Sampled]],
    words: Sequence[int],
    settings: UnlikelihoodSettings,
    checkpoint: Path,
    identity: Any,
    tick: Callable[[int], object] = int,
) -> LowRankRows:
    """Train, or resume from ``checkpoint``. Every step samples equally often from each of ``groups``.

    identity  the run's; a checkpoint of another run, or of other training data, is refused
    tick      called with the number of finished steps, before a checkpoint is written
    """
    optimizer = torch.optim.Adam(edit.parameters(), lr=settings.learning_rate)
    of = [identity, asdict(settings), [asdict(sample) for group in groups for sample in group], list(words)]
    of += [model.spec.fingerprint, digest([value.detach().flatten().tolist() for value in edit.parameters()])]
    step = restore_checkpoint(edit, optimizer, checkpoint, of)
    unwanted = torch.tensor(list(words), dtype=torch.long)
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
            loss = loss_of(model, edit, chosen, unwanted)
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
