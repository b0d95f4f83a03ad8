"""Requests inside long ordinary text: before it, after it, or between two of its passages."""

import random
from collections.abc import Sequence

BREAK = "\n\n"


def buried(request: str, passages: Sequence[str], words: int, chance: random.Random) -> str:
    """A text of about ``words`` words from ``passages``, with the request in it."""
    chosen: list[str] = []
    left = words
    while left > 0:
        passage = chance.choice(passages).strip().split(" ")[:left]
        left -= len(passage)
        chosen.append(" ".join(passage))
    at = chance.random()
    place = 0 if at < 0.4 else len(chosen) if at < 0.8 else chance.randrange(len(chosen) + 1)
    return BREAK.join([*chosen[:place], request, *chosen[place:]])
