"""The learned gated low-rank edit: ReLU rows at a few layers, trained through the frozen model.

At each layer ``x' = x + B relu(A x + b)`` with A [R, D], B [D, R], on the last prompt token and on generated
tokens alone: what a plan does whose gate is read at the end of the prompt and latched. The prompt before
it is never edited, so its keys and values are computed once without gradients, and a step costs only the
answer's tokens. Harmful prompts are taught a refusal (cross-entropy); benign ones keep the untouched model's
distribution on its own answer (KL divergence), as if the gate had opened by mistake.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, relu

from discovery.errors import DiscoveryError
from discovery.frozen_model import Edit, FrozenModel
from discovery.gate_probe import Probe
from discovery.progress import meter
from interpretops.atomic_file import write_atomically

ANSWER_TOKENS = 28
"""How much of the untouched model's own answer a benign prompt is held to."""


@dataclass(frozen=True)
class EditSettings:
    """What decides an edit, apart from data and model."""

    layers: tuple[int, ...]
    rank: int = 16
    steps: int = 300
    batch: int = 8
    """Harmful prompts of a step; as many benign ones."""
    learning_rate: float = 3e-3
    benign_weight: float = 4.0
    firing_weight: float = 0.02
    """Weight of the edit's relative size on benign prompts (an L1 term on firing)."""
    seed: int = 0

    def check(self) -> None:
        """Raise `DiscoveryError` for a value that makes no sense."""
        for name, good in (
            ("layers", len(self.layers) > 0),
            ("rank", self.rank >= 1),
            ("steps", self.steps >= 1),
            ("batch", self.batch >= 1),
            ("learning_rate", 0 < self.learning_rate < 1),
            ("benign_weight", self.benign_weight >= 0),
        ):
            if not good:
                raise DiscoveryError(
                    f"{name} = {getattr(self, name)!r} is out of range; see mechctl fit-gate --help"
                )


class GatedEdit(nn.Module):
    """The trainable rows of all layers; readings are scaled by a layer's typical norm, for training only."""

    def __init__(self, hidden_size: int, rank: int, norms: dict[int, float], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norms = norms
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        self.bias = nn.ParameterDict()
        for layer in norms:
            directions = torch.randn(rank, hidden_size, generator=generator) / hidden_size**0.5
            self.a[str(layer)] = nn.Parameter(directions)
            self.b[str(layer)] = nn.Parameter(torch.randn(rank, hidden_size, generator=generator) * 0.01)
            self.bias[str(layer)] = nn.Parameter(torch.zeros(rank))
        self.firing: list[Tensor] = []
        """Size of the edit per token at each layer of the last forward pass, in units of the layer's norm."""

    @torch.no_grad()
    def start_from(self, layer: int, row: int, probe: Probe, cut: float) -> None:
        """Let a row begin as a probe that fires above ``cut``."""
        self.a[str(layer)][row] = probe.direction * self.norms[layer]
        self.bias[str(layer)][row] = probe.bias - cut

    def at(self, layer: int) -> Edit:
        """The edit of one layer."""
        key, norm = str(layer), self.norms[layer]

        def edit(x: Tensor) -> Tensor:
            fired = relu((x.float() / norm) @ self.a[key].T + self.bias[key])
            change = fired @ self.b[key]
            self.firing.append(change.norm(dim=-1))
            edited: Tensor = (x.float() + norm * change).to(x.dtype)
            return edited

        return edit

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(read [R, D], bias [R], write [R, D]) in the model's own units."""
        key, norm = str(layer), self.norms[layer]
        return (
            (self.a[key] / norm).detach().clone(),
            self.bias[key].detach().clone(),
            (self.b[key] * norm).detach().clone(),
        )


@dataclass(frozen=True)
class Example:
    """A formatted prompt and the answer that training holds it to."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


Pick = Callable[[int], tuple[Sequence[Example], Sequence[Example]]]
"""Harmful and benign examples of step n; depends on n alone, so that a resumed run goes on the same way."""


def train_edit(
    model: FrozenModel, edit: GatedEdit, pick: Pick, settings: EditSettings, checkpoint: Path, identity: Any
) -> GatedEdit:
    """Train, or go on training from ``checkpoint``. Returns the edit."""
    settings.check()
    optimizer = torch.optim.Adam(edit.parameters(), lr=settings.learning_rate)
    step = _restore(edit, optimizer, checkpoint, identity)
    with meter("fit-gate", settings.steps, "steps", step) as progress:
        while step < settings.steps:
            rate = settings.learning_rate * _schedule(step, settings.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            harmful, benign = pick(step)
            refuse, stay, firing = losses(model, edit, harmful, benign)
            loss = refuse + settings.benign_weight * stay + settings.firing_weight * firing
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(edit.parameters(), 1.0)
            optimizer.step()
            step += 1
            progress.advance(
                1, f"refuse {refuse.item():.3f}, stay {stay.item():.3f}, firing {firing.item():.3f}"
            )
            if step % 20 == 0 or step == settings.steps:
                _save(edit, optimizer, checkpoint, identity, step)
    return edit


def losses(
    model: FrozenModel, edit: GatedEdit, harmful: Sequence[Example], benign: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the refusals, KL on the benign answers, size of the edit on the benign tokens."""
    edit.firing.clear()
    logits, target, live = _answer_logits(model, edit, harmful)
    picked = log_softmax(logits.float(), -1).gather(-1, target[..., None])[..., 0]
    refuse = -(picked * live).sum() / live.sum()
    edit.firing.clear()
    logits, _, live = _answer_logits(model, edit, benign)
    firing = sum((size * live).sum() / live.sum() for size in edit.firing) / max(len(edit.firing), 1)
    with torch.no_grad():
        reference, _, _ = _answer_logits(model, None, benign)
    divergence = kl_div(
        log_softmax(logits.float(), -1), log_softmax(reference.float(), -1), log_target=True, reduction="none"
    )
    stay = (divergence.sum(-1) * live).sum() / live.sum()
    return refuse, stay, torch.as_tensor(firing)


def _answer_logits(
    model: FrozenModel, edit: GatedEdit | None, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, T, V], target ids and mask [B, T] over the answers, edited from the prompt's end on."""
    before, before_mask = model.pad([example.prompt[:-1] for example in examples], side="left")
    read, read_mask = model.pad([(example.prompt[-1], *example.answer[:-1]) for example in examples])
    target, _ = model.pad([example.answer for example in examples])
    positions = (before_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = model.network.base_model(
            input_ids=before, attention_mask=before_mask, position_ids=positions, use_cache=True
        ).past_key_values
    answer_positions = before_mask.sum(1, keepdim=True) + torch.arange(read.shape[1], device=read.device)
    edits = {} if edit is None else {int(layer): edit.at(int(layer)) for layer in edit.a}
    with model.edited(edits):
        logits = model.network(
            input_ids=read,
            attention_mask=torch.cat([before_mask, read_mask], 1),
            position_ids=answer_positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits, target, read_mask


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / max(steps * 0.05, 1))
    return warm * (1.0 if step < steps * 0.6 else max((steps - step) / (steps * 0.4), 0.05))


def _save(
    edit: GatedEdit, optimizer: torch.optim.Optimizer, checkpoint: Path, identity: Any, step: int
) -> None:
    tensors = {f"edit.{name}": value.detach().clone() for name, value in edit.named_parameters()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{index}.{name}": value.detach().clone() for name, value in state.items()}
    data = save_safetensors(tensors, {"step": str(step), "identity": json.dumps(identity, sort_keys=True)})
    write_atomically(checkpoint, data)


def _restore(edit: GatedEdit, optimizer: torch.optim.Optimizer, checkpoint: Path, identity: Any) -> int:
    if not checkpoint.exists():
        return 0
    from safetensors import safe_open

    with safe_open(checkpoint, "pt") as file:
        metadata = file.metadata()
    if json.loads(metadata["identity"]) != json.loads(json.dumps(identity)):
        raise DiscoveryError(f"{checkpoint}: is of another training; remove it or give another --work")
    tensors = load_file(checkpoint)
    parameters = dict(edit.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"edit.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam."):
            _, index, part = name.split(".")
            state.setdefault(int(index), {})[part] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(metadata["step"])


def settings_record(settings: EditSettings) -> dict[str, Any]:
    """The settings as plain JSON."""
    return dict(json.loads(json.dumps(asdict(settings))))
