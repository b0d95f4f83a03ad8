"""The learned gate: ReLU rows on prompt tokens gather what speaks for a class, a probe at the end reads it.

At each of a few layers ``x' = x + B relu(A x + b)`` acts on the prompt alone, every token for itself
(bottleneck adapters, Houlsby et al. 2019, arXiv:1902.00751, at the residual stream). Attention carries what
they write to the last prompt token, where a linear probe decides. Nothing depends on tokens that a prefix
cache would skip, and generated tokens are never edited. Trained through the frozen layers below the probe, on
binary cross-entropy and on the distance of benign prompts from where the untouched model would have them, at
every layer up to the probe, so that their answers stay what they were.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from discovery.checkpoint import learning_rate, restore_checkpoint, save_checkpoint
from discovery.errors import DiscoveryError
from discovery.frozen_model import Edit, FrozenModel
from discovery.low_rank import LowRankRows
from discovery.progress import Meter, meter

SOFTENED = 0.01
"""Labels are 0.01 and 0.99: a probe that is certain of everything has learned its data by heart."""
CLOSED_BIAS = -0.03
"""Bias of untrained rows: about a quarter of them fire at a token."""
GROWS = 0.5
"""Share of the training over which the weight of holding still grows to what it is."""
GROWS_FROM = 0.1
"""What share of its weight holding still begins with."""
EVERY = 20
"""Steps between checkpoints."""

Labelled = tuple[tuple[int, ...], bool]
"""A formatted prompt, and whether it is of the class."""
Draw = Callable[[random.Random], Labelled]


@dataclass(frozen=True)
class GateSettings:
    """What decides the gate, apart from data and model."""

    layer: int
    """Layer at which the probe reads."""
    rows_at: tuple[int, ...] = ()
    """Layers of the rows on prompt tokens, below the probe's; empty: the probe reads the untouched model."""
    rank: int = 32
    """ReLU rows at each of these layers."""
    steps: int = 500
    batch_tokens: int = 2400
    learning_rate: float = 1.5e-3
    hold_weight: float = 0.5
    """Weight of the relative distance of benign prompts from the untouched model's."""
    benign_budget: float = 0.02
    """Share of the plain benign selection prompts of a group that may newly be refused."""
    borderline_budget: float = 0.12
    """The same for benign prompts that sound harmful, or come in a jailbreak's clothes."""
    seed: int = 0

    def trained(self) -> dict[str, Any]:
        """What decides the training; the budgets only choose the threshold afterwards."""
        return {name: value for name, value in asdict(self).items() if not name.endswith("_budget")}

    def check(self) -> None:
        """Raise `DiscoveryError` for a value that makes no sense."""
        for name, good in (
            ("rows_at", all(layer < self.layer for layer in self.rows_at)),
            ("rank", self.rank >= 1),
            ("steps", self.steps >= 1),
            ("batch_tokens", self.batch_tokens >= 64),
            ("learning_rate", 0 < self.learning_rate < 1),
            ("hold_weight", self.hold_weight >= 0),
        ):
            if not good:
                raise DiscoveryError(
                    f"{name} = {getattr(self, name)!r} is out of range; see mechctl fit-gate --help"
                )


class LearnedGate(nn.Module):
    """Rows on the prompt and the probe behind them."""

    def __init__(
        self, model: FrozenModel, settings: GateSettings, norms: dict[int, float], bounds: dict[int, float]
    ) -> None:
        super().__init__()
        settings.check()
        self.model, self.settings = model, settings
        width = model.spec.hidden_size
        self.rows = LowRankRows(
            width,
            settings.rank,
            {layer: norms[layer] for layer in settings.rows_at},
            settings.seed,
            bounds=bounds,
            bias=CLOSED_BIAS,
            write=0.0,
        )
        self.norm = norms[settings.layer]
        self.direction = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(()))

    def edits(self) -> dict[int, Edit]:
        """The edits of the prompt by layer."""
        return {layer: self.rows.at(layer) for layer in self.settings.rows_at}

    def read(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Readings [B] at the ends of prompts [B, T], and the residual stream on the way (see `stream`)."""
        self.rows.firing.clear()
        stream = self.stream(tokens, self.edits())
        last = stream[-1][torch.arange(len(tokens)), mask.sum(1) - 1].float()
        return (last / self.norm) @ self.direction + self.bias, stream

    def stream(self, tokens: Tensor, edits: Mapping[int, Edit]) -> list[Tensor]:
        """The residual stream [B, T, D] under some edits, at the rows' layers and last at the probe's.

        Prompts are padded on the right, where causal attention does not look: no mask is needed.
        """
        kept: list[Tensor] = []

        def keep(layer: int) -> Edit:
            def edit(x: Tensor) -> Tensor:
                kept.append(edits[layer](x) if layer in edits else x)
                if layer == self.settings.layer:
                    raise _Enough
                return kept[-1]

            return edit

        layers = (*self.settings.rows_at, self.settings.layer)
        with self.model.edited({layer: keep(layer) for layer in layers}), suppress(_Enough):
            self.model.network.base_model(input_ids=tokens, use_cache=False)
        return kept

    @torch.no_grad()
    def readings(self, prompts: Sequence[Sequence[int]], progress: Meter | None = None) -> Tensor:
        """Readings [N] of many prompts."""
        found = torch.zeros(len(prompts))
        for places in windows(prompts, 2 * self.settings.batch_tokens):
            tokens, mask = self.model.pad([prompts[place] for place in places])
            found[places] = self.read(tokens, mask)[0].cpu()
            if progress is not None:
                progress.advance(int(mask.sum()))
        return found

    def probe(self) -> tuple[Tensor, float]:
        """(direction [D], bias) in the model's own units."""
        return (self.direction / self.norm).detach().clone(), float(self.bias.detach())


class _Enough(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    """The probe's layer has been seen."""


def windows(prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
    """Places of the prompts in batches of similar length, each of at most ``tokens`` with its padding."""
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    found: list[list[int]] = []
    for place in order:
        if found and (len(found[-1]) + 1) * len(prompts[place]) <= tokens:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def train_gate(gate: LearnedGate, draw: Draw, work: Path, identity: Any) -> LearnedGate:
    """Train, or go on from the checkpoint in ``work``. Step n depends on the seed and n alone."""
    settings = gate.settings
    checkpoint, identity = work / "gate.safetensors", [settings.trained(), identity]
    rows = [parameter for name, parameter in gate.named_parameters() if name not in ("direction", "bias")]
    groups = [{"params": rows}] if rows else []
    optimizer = torch.optim.Adam([*groups, {"params": [gate.direction, gate.bias]}], betas=(0.9, 0.98))
    step = restore_checkpoint(gate, optimizer, checkpoint, identity)
    with meter("fit-gate: gate", settings.steps, "steps", step) as progress:
        while step < settings.steps:
            rate = learning_rate(settings.learning_rate, step, settings.steps)
            for group, factor in zip(reversed(optimizer.param_groups), (5, 1), strict=False):
                group["lr"] = factor * rate
            chance = random.Random(settings.seed * 1_000_003 + step)  # noqa: S311 (sampling)
            wrong, moved = gate_losses(gate, batch(draw, settings.batch_tokens, chance))
            grown = min(1.0, GROWS_FROM + (1 - GROWS_FROM) * step / (GROWS * settings.steps))
            loss = wrong + settings.hold_weight * grown * moved
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
            optimizer.step()
            step += 1
            progress.advance(1, f"wrong {wrong.item():.3f}, moved {moved.item():.4f}")
            if step % EVERY == 0 or step == settings.steps:
                save_checkpoint(gate, optimizer, checkpoint, identity, step)
    return gate


def batch(draw: Draw, tokens: int, chance: random.Random) -> list[Labelled]:
    """Prompts of similar length: a window of ``tokens`` out of several times as many, sorted by length."""
    drawn: list[Labelled] = []
    total = 0
    while total < 4 * tokens:
        drawn.append(draw(chance))
        total += len(drawn[-1][0])
    drawn.sort(key=lambda item: len(item[0]))
    skip = chance.random() * (total - tokens)
    chosen: list[Labelled] = []
    for item in drawn:
        skip -= len(item[0])
        if skip < 0:
            chosen.append(item)
            if sum(len(ids) for ids, _ in chosen) >= tokens:
                break
    return chosen


def gate_losses(gate: LearnedGate, examples: Sequence[Labelled]) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of the readings, and the distance of benign prompts from the untouched model's."""
    tokens, mask = gate.model.pad([ids for ids, _ in examples])
    readings, stream = gate.read(tokens, mask)
    of_class = torch.tensor([wanted for _, wanted in examples], device=readings.device)
    wrong = binary_cross_entropy_with_logits(readings, of_class.float().clamp(SOFTENED, 1 - SOFTENED))
    if not gate.settings.rows_at or bool(of_class.all()):
        return wrong, torch.zeros(())
    return wrong, distance(gate, tokens[~of_class], mask[~of_class], [x[~of_class] for x in stream])


def distance(gate: LearnedGate, tokens: Tensor, mask: Tensor, stream: Sequence[Tensor]) -> Tensor:
    """How far ``stream`` is from the untouched one: of all tokens, and once more of the last.

    The last token counts as much as the rest together, since the answer begins there.
    """
    with torch.no_grad():
        untouched = gate.stream(tokens, {})
    ends = (torch.arange(len(tokens)), mask.sum(1) - 1)
    found = []
    for before, after in zip(untouched, stream, strict=True):
        moved = (after.float() - before.float()).norm(dim=-1) / before.float().norm(dim=-1).clamp(min=1e-6)
        found.append((moved * mask).sum() / mask.sum() + moved[ends].mean())
    return torch.stack(found).mean()
