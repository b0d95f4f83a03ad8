"""The learned gated low-rank edit: ReLU rows at a few layers, trained through the frozen model.

At each layer ``x' = x + B relu(A x + b)`` with A [R, D], B [D, R], on the last prompt token and on generated
tokens only, like a plan whose gate is decided at the end of the prompt and latched. The rest of the prompt is
not edited, so its keys and values are computed once without gradients, and a step costs only the answer's
tokens. Harmful prompts are trained towards a refusal (cross-entropy). With a benign weight, benign prompts
keep the unmodified model's distribution on its own answer (KL divergence), as if the gate had opened by
mistake: this protects some of them, and lets some harmful ones through.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from discovery.frozen_model import FrozenModel
from discovery.gates.gate_settings import EditSettings
from discovery.gates.low_rank import LowRankRows
from discovery.jobs.progress import meter
from discovery.jobs.training_checkpoint import learning_rate, restore_checkpoint, save_checkpoint
from interpretops.steering.answer_loop import positions_of

ANSWER_TOKENS = 28
"""Tokens of the unmodified model's answer that a benign prompt must keep."""


@dataclass(frozen=True)
class Example:
    """A formatted prompt and its training answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


Pick = Callable[[int], tuple[Sequence[Example], Sequence[Example]]]
"""Harmful and benign examples of step n; depends only on n, so a resumed run continues identically."""


def train_edit(
    model: FrozenModel,
    edit: LowRankRows,
    pick: Pick,
    settings: EditSettings,
    checkpoint: Path,
    identity: Any,
) -> LowRankRows:
    """Train, or go on training from ``checkpoint``."""
    optimizer = torch.optim.Adam(edit.parameters(), lr=settings.learning_rate)
    step = restore_checkpoint(edit, optimizer, checkpoint, identity)
    with meter("fit-gate: edit", settings.steps, "steps", step) as progress:
        while step < settings.steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings.learning_rate, step, settings.steps)
            harmful, benign = pick(step)
            refuse, stay, firing = losses(model, edit, harmful, benign)
            loss = refuse + settings.benign_weight * stay + settings.firing_weight * firing
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(edit.parameters(), 1.0)
            optimizer.step()
            step += 1
            progress.advance(1, f"refuse {refuse.item():.3f}, stay {float(stay):.3f}")
            if step % 20 == 0 or step == settings.steps:
                save_checkpoint(edit, optimizer, checkpoint, identity, step)
    return edit


def losses(
    model: FrozenModel,
    edit: LowRankRows,
    harmful: Sequence[Example],
    benign: Sequence[Example],
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the refusals, KL on the benign answers, size of the edit on the benign tokens."""
    edit.firing.clear()
    logits, target, live = _answer_logits(model, edit, harmful)
    picked = log_softmax(logits.float(), -1).gather(-1, target[..., None])[..., 0]
    refuse = -(picked * live).sum() / live.sum()
    if not benign:
        return refuse, torch.zeros(()), torch.zeros(())
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
    model: FrozenModel, edit: LowRankRows | None, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, T, V], target ids and mask [B, T] over the answers, edited from the prompt's end on."""
    prompt, prompt_mask = model.pad([example.prompt[:-1] for example in examples], side="left")
    read, read_mask = model.pad([(example.prompt[-1], *example.answer[:-1]) for example in examples])
    target, _ = model.pad([example.answer for example in examples])
    cache = prompt_cache(model, prompt, prompt_mask)
    answer_positions = prompt_mask.sum(1, keepdim=True) + torch.arange(read.shape[1], device=read.device)
    edits = {} if edit is None else {int(layer): edit.at(int(layer)) for layer in edit.a}
    with model.edited(edits):
        logits = model.network(
            input_ids=read,
            attention_mask=torch.cat([prompt_mask, read_mask], 1),
            position_ids=answer_positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
    return logits, target, read_mask


@torch.no_grad()
def prompt_cache(model: FrozenModel, tokens: Tensor, mask: Tensor) -> Any:
    """Keys and values of prompts [B, T], padded on the left."""
    return model.network.base_model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=positions_of(mask),
        use_cache=True,
    ).past_key_values


def settings_record(settings: EditSettings) -> dict[str, Any]:
    """The settings as plain JSON."""
    return dict(json.loads(json.dumps(asdict(settings))))
