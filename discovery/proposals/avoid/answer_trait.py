"""A trait of the model's own answers: sampled continuations, and where in them the trait begins.

Shape letters: N tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from discovery.data.trace import batches
from discovery.frozen_model import FrozenModel
from discovery.gates.contrast import Judged
from discovery.jobs.progress import Meter
from discovery.proposals.judging import shows
from interpretops.steering.causal_model import CausalModel

BATCH = 48
BEFORE = 2
"""Number of tokens before the completing one that count as leading to the trait."""


@dataclass(frozen=True)
class Sampled:
    """A prompt with one sampled answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    begins: int | None
    """Index in the answer of the token that completes the first sign of the trait; None without one."""

    @property
    def ids(self) -> list[int]:
        """Prompt and answer."""
        return [*self.prompt, *self.answer]


def sampled_answers(
    model: CausalModel, prompts: Sequence[Sequence[int]], most: int, seed: int, progress: Meter
) -> list[list[int]]:
    """Answers sampled at temperature 1 from the model, steered if a session is open."""
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index))
    for start in range(0, len(order), BATCH):
        chunk = order[start : start + BATCH]
        answers = model.answers([prompts[index] for index in chunk], most, sample_seed=seed * 100_003 + start)
        for index, answer in zip(chunk, answers, strict=True):
            found[index] = model.without_stop(answer)
        progress.advance(len(chunk))
    return found


def locate(model: FrozenModel, judge: Judged, prompt: Sequence[int], answer: Sequence[int]) -> Sampled:
    """The answer, with the end of the shortest beginning in which the judge sees the trait."""
    begins = None
    if answer and shows(judge, model.decode(answer)):
        # A word may continue ("ass" in "assess"): the judge must still see the trait one token later.
        seen = [shows(judge, model.decode(answer[: end + 1])) for end in range(len(answer))]
        stands = [end for end in range(len(seen)) if all(seen[end : end + 2])]
        begins = stands[0] if stands else len(answer) - 1
    return Sampled(tuple(prompt), tuple(answer), begins)


def trait_vocabulary(model: FrozenModel, judge: Judged) -> list[int]:
    """Tokens that are words with the trait by themselves."""
    words = model.tokenizer.batch_decode([[token] for token in range(len(model.tokenizer))])
    return [token for token, word in enumerate(words) if len(word.strip()) > 2 and shows(judge, word.strip())]


@torch.no_grad()
def trait_tokens(
    model: FrozenModel, samples: Sequence[Sampled], layers: Sequence[int], most: int, progress: Meter
) -> dict[str, Tensor]:
    """Activations [N, D] by ``trait/<layer>`` and ``other/<layer>``.

    ``trait``: the tokens from which the trait was predicted; ``other``: tokens of answers without it.
    """
    found: dict[str, list[Tensor]] = {
        f"{kind}/{layer}": [] for kind in ("trait", "other") for layer in layers
    }
    for batch in batches([sample.ids for sample in samples]):
        tokens, mask = model.pad([ids for _, ids in batch])
        residuals = model.residuals(tokens, mask, layers)
        for row, (place, ids) in enumerate(batch):
            sample = samples[place]
            first = len(sample.prompt) - 1
            if sample.begins is None:
                kind, span = "other", slice(max(first, 1), len(ids) - 1)
            else:
                last = first + sample.begins
                kind, span = "trait", slice(max(first, 1, last - BEFORE), last + 1)
            for layer in layers:
                found[f"{kind}/{layer}"].append(residuals[layer][row, span].float().cpu())
        progress.advance(len(batch))
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for key, parts in found.items():
        x = torch.cat(parts) if parts else torch.zeros(0, model.spec.hidden_size)
        tensors[key] = x[torch.randperm(len(x), generator=generator)[:most]] if len(x) > most else x
    return tensors
