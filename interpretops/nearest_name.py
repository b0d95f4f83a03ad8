"""Suggests a remedy for an unknown name: the nearest known name, or all of them."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Final

_MOST: Final = 12


def remedy(name: str, known: Collection[str]) -> str:
    """``did you mean 'jailbreak'?``, or the known names if none is close."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    listed = sorted(known)
    more = ", …" if len(listed) > _MOST else ""
    return f"known are {', '.join(listed[:_MOST])}{more}" if listed else "none is known"
