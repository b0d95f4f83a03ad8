"""One line of the doctor's: what was checked, how it stands, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "fault"]
"""A fault keeps `mechctl serve` from serving as the settings say. A warning does not."""


@dataclass(frozen=True)
class Finding:
    """How one thing stands."""

    subject: str
    """What was looked at: `machine`, `model`, `policy jailbreak` …"""
    state: State
    text: str
    """What was found; of a warning or a fault also the remedy."""


def ok(subject: str, text: str) -> Finding:
    """Nothing to do."""
    return Finding(subject, "ok", text)


def warning(subject: str, text: str) -> Finding:
    """It serves, but an operator should know."""
    return Finding(subject, "warning", text)


def fault(subject: str, error: object) -> list[Finding]:
    """A fault for every line of an error."""
    lines = str(error).splitlines() or [type(error).__name__]
    return [Finding(subject, "fault", line) for line in lines]
