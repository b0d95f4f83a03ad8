"""Greedy answers under a learned edit whose gate opens at the last prompt token."""

from collections.abc import Sequence

import torch

from discovery.frozen_model import FrozenModel
from discovery.gates.gated_edit import prompt_cache
from discovery.gates.low_rank import LowRankRows
from discovery.jobs.progress import Meter
from interpretops.steering.answer_loop import continue_tokens

BATCH = 32


@torch.no_grad()
def edited_answers(
    model: FrozenModel,
    edit: LowRankRows | None,
    prompts: Sequence[Sequence[int]],
    most: int,
    progress: Meter | None = None,
) -> list[list[int]]:
    """Answers of at most ``most`` tokens, without end-of-turn token; without edits, the model's own."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: list[list[int]] = [[] for _ in prompts]
    start = 0
    while start < len(order):
        size = max(1, min(BATCH, 12_000 // len(prompts[order[min(start + BATCH, len(order)) - 1]])))
        chunk = order[start : start + size]
        start += size
        answers = _answer(model, edit, [prompts[i] for i in chunk], most)
        for index, answer in zip(chunk, answers, strict=True):
            found[index] = answer
        if progress is not None:
            progress.advance(len(chunk))
    return found


def _answer(
    model: FrozenModel,
    edit: LowRankRows | None,
    prompts: Sequence[Sequence[int]],
    most: int,
) -> list[list[int]]:
    tokens, mask = model.pad([ids[:-1] for ids in prompts], side="left")
    cache = prompt_cache(model, tokens, mask)
    last = torch.tensor([[ids[-1]] for ids in prompts], device=tokens.device)
    edits = {} if edit is None else {int(layer): edit.at(int(layer)) for layer in edit.a}
    with model.edited(edits):
        answers = continue_tokens(
            model.network,
            last,
            most,
            mask=torch.cat([mask, torch.ones_like(last)], 1),
            cache=cache,
            stops=model.stop_tokens,
            pad=model.pad_id,
            after_pass=None if edit is None else edit.firing.clear,
        )
    return [model.without_stop(answer) for answer in answers]
