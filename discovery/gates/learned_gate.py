"""The learned gate: an attention probe that reads the whole prompt, before any edit, at a few layers.

Each of a few heads a layer weighs the prompt's tokens by a softmax of ``query . x`` and takes the weighted
mean of ``read . x + bias``; the sum over all heads is the reading (attention probes, e.g. McKenzie et al.
2025, arXiv:2506.10805). For every prompt token, the engine stores two numbers per head in addition to keys
and values (`interpretops.plan.Gate`). So the reading does not depend on what a prefix cache skips, and no
token is edited before the gate opens. The model runs once to collect the activations, not during training.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from discovery.data.sequences import batches
from discovery.frozen_model import FrozenModel
from discovery.gates.gate_settings import GateSettings
from discovery.gates.prompt_activations import PromptActivations, stacked
from discovery.jobs.progress import Meter, meter
from discovery.jobs.training_checkpoint import learning_rate, restore_checkpoint, save_checkpoint

SOFTENED = 0.01
"""Label smoothing: labels are 0.01 and 0.99, which limits overfitting."""
UNSEEN_TOKENS = 0.1
"""Share of the prompt's tokens that a training step drops."""
WEIGHT_DECAY = 0.05
UNREAD = -1e9
"""Score of tokens that are not read."""
SAMPLED = 50
"""Every n-th prompt is used for the mean and spread that standardise activations."""

Labelled = tuple[tuple[int, ...], bool]
"""A formatted prompt, and whether it belongs to the class."""


def _pooled(score: Tensor, value: Tensor, tokens: Tensor, window: int | None) -> Tensor:
    """Readings [B] of prompts of ``tokens`` [B] from score and value [B, L, T, H]; the largest of windows."""
    if window is None or score.shape[2] <= window:
        return (score.softmax(2) * value).sum((1, 2, 3))
    step = max(1, window // 4)
    count = math.ceil((score.shape[2] - window) / step) + 1
    starts = torch.minimum(
        torch.arange(count, device=score.device)[None] * step, (tokens - window).clamp(min=0)[:, None]
    )
    places = (starts[:, :, None] + torch.arange(window, device=score.device)).flatten(1)  # [B, C W]
    index = places[:, None, :, None].expand(-1, score.shape[1], -1, score.shape[3])
    shape = (*score.shape[:2], count, window, score.shape[3])
    scores, values = (array.gather(2, index).view(shape) for array in (score, value))
    # A window of sinks alone contributes nothing, as in the op.
    read = (scores > UNREAD / 2).any(3)
    return ((scores.softmax(3) * values).sum(3) * read).sum((1, 3)).amax(1)


class LearnedGate(nn.Module):
    """The probe, on standardised activations.

    Shape letters: B prompts, T tokens, L layers, D width, H heads a layer.
    """

    def __init__(self, settings: GateSettings, mean: Tensor, spread: Tensor, bounds: Tensor) -> None:
        """mean, spread  [L, D] of ordinary tokens; bounds  [L] the norm above which a token is a sink"""
        super().__init__()
        self.settings = settings
        self.mean, self.spread, self.bounds = nn.Buffer(mean), nn.Buffer(spread), nn.Buffer(bounds)
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (len(mean), settings.heads, mean.shape[1])
        self.query = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        self.value = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        self.bias = nn.Parameter(torch.zeros(shape[:2]))

    def forward(self, x: Tensor, real: Tensor, chance: torch.Generator | None = None) -> Tensor:
        """Readings [B] of prompts x [B, T, L, D]; with a generator, with the dropout of a training step."""
        seen = real[..., None] & (x.norm(dim=-1) <= self.bounds)
        scale = (1 / self.spread).expand(len(x), -1, -1)
        if chance is not None:
            unseen = self.settings.unseen_numbers
            kept = torch.rand(scale.shape, generator=chance).to(x.device) >= unseen
            scale = scale * kept / (1 - unseen)
            fewer = seen & (torch.rand(seen.shape, generator=chance).to(x.device) >= UNSEEN_TOKENS)
            seen = torch.where(fewer.any(1, keepdim=True), fewer, seen)
        # Standardise the few directions instead of every token: the products are the same.
        both = torch.cat([self.query, self.value], dim=1) * scale[:, :, None]  # [B, L, 2 H, D]
        score, value = torch.matmul(x.transpose(1, 2), both.transpose(2, 3)).chunk(2, dim=3)  # [B, L, T, H]
        shift = self.bias - torch.einsum("blhd,ld->blh", both[:, :, len(self.bias[0]) :], self.mean)
        score = score.masked_fill(~seen.transpose(1, 2)[..., None], UNREAD)
        return _pooled(score, value + shift[:, :, None], real.sum(1), self.settings.window)

    @torch.no_grad()
    def numbers(self) -> dict[int, dict[str, Tensor]]:
        """By layer, query [H, D], read [H, D] and bias [H] for plain activations."""
        read = self.value / self.spread[:, None]
        query = self.query / self.spread[:, None]
        bias = self.bias - torch.einsum("lhd,ld->lh", read, self.mean)
        return {
            layer: {"query": query[n].clone(), "read": read[n].clone(), "bias": bias[n].clone()}
            for n, layer in enumerate(self.settings.layers)
        }

    @torch.no_grad()
    def readings(
        self, model: FrozenModel, prompts: Sequence[Sequence[int]], progress: Meter | None = None
    ) -> Tensor:
        """Readings [N] of formatted prompts."""
        found = torch.zeros(len(prompts))
        for group in batches([list(ids) for ids in prompts]):
            tokens, mask = model.pad([ids for _, ids in group])
            x = stacked(model, tokens, mask, self.settings.layers)
            found[[place for place, _ in group]] = self(x.cpu(), mask.bool().cpu())
            if progress is not None:
                progress.advance(int(mask.sum()))
        return found


def new_gate(settings: GateSettings, activations: PromptActivations, bounds: Sequence[float]) -> LearnedGate:
    """An untrained gate, standardised on a sample of the activations, without sinks."""
    sample = np.concatenate([activations.of(n) for n in range(0, len(activations.prompts), SAMPLED)])
    x = torch.from_numpy(sample).float()
    kept = [x[x[:, n].norm(dim=-1) <= bound, n] for n, bound in enumerate(bounds)]
    mean = torch.stack([part.mean(0) for part in kept])
    spread = torch.stack([part.std(0) for part in kept]).clamp(min=1e-6)
    return LearnedGate(settings, mean, spread, torch.tensor(bounds))


def train_probes(
    settings: GateSettings,
    activations: PromptActivations,
    bounds: Sequence[float],
    of_class: Sequence[bool],
    work: Path,
    identity: Any,
    device: torch.device | str = "cpu",
) -> list[LearnedGate]:
    """Train the probes one after the other, each from its own seed; returns them on the CPU."""
    probes = []
    for number in range(settings.probes):
        own = replace(settings, probes=1, seed=settings.seed + number)
        folder = work if number == 0 else work / f"probe-{number}"
        folder.mkdir(parents=True, exist_ok=True)
        gate = new_gate(own, activations, bounds).to(device)
        probes.append(train_gate(gate, activations, of_class, folder, identity).to("cpu"))
    return probes


def train_gate(
    gate: LearnedGate, activations: PromptActivations, of_class: Sequence[bool], work: Path, identity: Any
) -> LearnedGate:
    """Train, or resume from the checkpoint in ``work``. Epoch n depends only on the seed and n."""
    settings, device = gate.settings, gate.query.device
    checkpoint, identity = work / "gate.safetensors", [settings.trained(), identity]
    optimizer = torch.optim.AdamW(gate.parameters(), weight_decay=WEIGHT_DECAY)
    epoch = restore_checkpoint(gate, optimizer, checkpoint, identity)
    wanted = torch.tensor(of_class).float().clamp(SOFTENED, 1 - SOFTENED).to(device)
    with meter("fit-gate: gate", settings.epochs, "epochs", epoch) as progress:
        while epoch < settings.epochs:
            seed = settings.seed * 1_000_003 + epoch
            chance = torch.Generator().manual_seed(seed)
            groups = shuffled(activations.prompts, settings.batch_tokens, seed)
            total = 0.0
            for step, places in enumerate(groups):
                for group in optimizer.param_groups:
                    at = epoch * len(groups) + step
                    group["lr"] = learning_rate(settings.learning_rate, at, settings.epochs * len(groups))
                x, real = activations.padded(places)
                readings = gate(x.to(device).float(), real.to(device), chance)
                loss = binary_cross_entropy_with_logits(readings, wanted[places])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.item()
            epoch += 1
            progress.advance(1, f"loss {total / len(groups):.3f}")
            save_checkpoint(gate, optimizer, checkpoint, identity, epoch)
    return gate


def shuffled(prompts: Sequence[Sequence[int]], tokens: int, seed: int) -> list[list[int]]:
    """Indices of all prompts in shuffled batches of at most ``tokens``, including padding."""
    chance = random.Random(seed)  # noqa: S311 (order, no secret)
    order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), chance.random()))
    found: list[list[int]] = [[]]
    for place in order:
        if found[-1] and (len(found[-1]) + 1) * len(prompts[place]) > tokens:
            found.append([])
        found[-1].append(place)
    chance.shuffle(found)
    return found
