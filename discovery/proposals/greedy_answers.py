"""Greedy answers to many prompts, in batches of similar length."""

from collections.abc import Sequence

from discovery.jobs.progress import Meter
from interpretops.steering.hooked_model import HookedModel

BATCH = 32


def greedy_answers(
    model: HookedModel, prompts: Sequence[Sequence[int]], most: int, progress: Meter
) -> list[str]:
    """Greedy answers of at most ``most`` tokens; steered when a session is open."""
    found = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        answers = model.answers([prompts[index] for index in chunk], most)
        for index, answer in zip(chunk, answers, strict=True):
            found[index] = model.decode(answer).strip()
        progress.advance(len(chunk))
    return found
