"""Locates each sequence's tokens in a batch passed to a transformers model.

Shape letters: B sequences, T tokens of a pass, P tokens already in the key-value cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from interpretops.errors import ModelError


def real_spans(mask: Any, batch: int, past: int, tokens: int) -> list[tuple[int, int]]:
    """Where each sequence's real tokens begin and end in the P + T columns of the attention mask."""
    length = past + tokens
    if mask is None:
        return [(0, length)] * batch
    if not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, length):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ModelError(
            f"attention_mask is {shape}, but a session reads one of [{batch}, {length}], 1 for real tokens"
        )
    spans = []
    for row in (mask != 0).long().cpu():
        places = row.nonzero().flatten().tolist()
        start, end = (places[0], places[-1] + 1) if places else (0, 0)
        if len(places) != end - start:
            raise ModelError(
                "attention_mask has gaps, but a session reads padding on the left or the right only"
            )
        spans.append((start, end))
    return spans


def check_positions(positions: Any, spans: list[tuple[int, int]], past: int) -> None:
    """Raise `ModelError` if positions restart inside a sequence: several texts packed into one."""
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] == 1:
        return
    for row, (start, end) in zip(positions.expand(len(spans), -1).cpu(), spans, strict=True):
        real = row[max(start - past, 0) : max(end - past, 0)]
        if bool((real.diff() != 1).any()):
            raise ModelError(
                "position_ids do not rise by one from token to token, but a session reads one text a "
                "sequence; give packed texts as a padded batch"
            )
