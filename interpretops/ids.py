"""Ids of circuits, jobs, runs and reports: a prefix for the kind, and a ULID, sorted by creation time."""

import re
import secrets
import time
from typing import Literal

Prefix = Literal["cx", "job", "run", "rep"]
_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LENGTH = 26


def new_id(prefix: Prefix, *, now_ms: int | None = None) -> str:
    """A new id, as ``cx_01JD8M0T5W…``: 48 bits of Unix time in milliseconds, then 80 random bits."""
    when = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    value = (when << 80) | secrets.randbits(80)
    digits = [_ALPHABET[(value >> (5 * place)) & 31] for place in reversed(range(_LENGTH))]
    return f"{prefix}_{''.join(digits)}"


def made_at_ms(identifier: str) -> int:
    """The Unix time in milliseconds at which an id was created."""
    value = 0
    for letter in identifier.rpartition("_")[2]:
        value = value * 32 + _ALPHABET.index(letter)
    return value >> 80


def id_pattern(prefix: Prefix) -> str:
    """A regular expression that matches exactly the ids with this prefix."""
    return rf"^{re.escape(prefix)}_[0-7][{_ALPHABET}]{{{_LENGTH - 1}}}$"
