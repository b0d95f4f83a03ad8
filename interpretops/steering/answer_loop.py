"""The generation loop: continues a batch of prompts token by token, greedily or by sampling.

Shape letters: B sequences, T tokens, P tokens already in the key-value cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Choose = Callable[[Tensor], Tensor]
"""Takes logits [B, V] in float32 and returns the next token [B] of each sequence."""


def greedy(logits: Tensor) -> Tensor:
    """The most likely token."""
    return logits.argmax(-1)


def drawn(chance: torch.Generator, temperature: float = 1.0) -> Choose:
    """Sample a token from the logits' distribution at a temperature above 0."""

    def choose(logits: Tensor) -> Tensor:
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=chance)[:, 0]

    return choose


def pad_tokens(
    sequences: Sequence[Sequence[int]],
    pad: int,
    device: torch.device,
    side: Literal["left", "right"] = "right",
) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, T] of sequences of unequal length; the mask is 0 at padding."""
    longest = max(len(ids) for ids in sequences)
    tokens = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    for row, ids in enumerate(sequences):
        place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
        tokens[row, place] = torch.tensor(ids, dtype=torch.long)
        mask[row, place] = 1
    return tokens.to(device), mask.to(device)


def positions_of(mask: Tensor) -> Tensor:
    """Each token's position in its sequence, [B, T]; sequences begin where their mask does."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@torch.no_grad()
def continue_tokens(
    network: Any,
    tokens: Tensor,
    most: int,
    *,
    stops: Collection[int],
    pad: int,
    mask: Tensor | None = None,
    cache: Any = None,
    choose: Choose = greedy,
    after_pass: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Answers of at most ``most`` tokens; an answer that ends by itself includes its stop token.

    tokens      [B, T] ids that the model has not processed yet
    mask        [B, P + T] 1 for real tokens, padded on the left; None if no sequence is padded
    cache       keys and values of the P earlier tokens, or None
    after_pass  called after each pass of the model
    """
    answers: list[list[int]] = [[] for _ in range(len(tokens))]
    running = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    ends = torch.tensor(sorted(stops), dtype=torch.long, device=tokens.device)
    for _ in range(most):
        placed = {}
        if mask is not None:
            placed = {
                "attention_mask": mask,
                "position_ids": positions_of(mask)[:, -tokens.shape[1] :],
            }
        out = network(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, **placed)
        if after_pass is not None:
            after_pass()
        cache = out.past_key_values
        chosen = choose(out.logits[:, -1].float())
        for row in running.nonzero()[:, 0].tolist():
            answers[row].append(int(chosen[row]))
        running &= ~torch.isin(chosen, ends)
        if not bool(running.any()):
            break
        tokens = chosen.where(running, pad)[:, None]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return answers
