"""One line of output: what was checked, its state, and the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "fault"]
"""A fault keeps `mechctl serve` from serving as the settings say. A warning does not."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    subject: str
    """What was checked: `machine`, `model`, `policy jailbreak` …"""
    state: State
    text: str
    """The result; for a warning or fault, also the remedy."""


def ok(subject: str, text: str) -> Finding:
    """A check that passed."""
    return Finding(subject, "ok", text)


def warning(subject: str, text: str) -> Finding:
    """The gateway can serve, but an operator should know."""
    return Finding(subject, "warning", text)


def fault(subject: str, error: object) -> list[Finding]:
    """One fault for each line of an error."""
    lines = str(error).splitlines() or [type(error).__name__]
    return [Finding(subject, "fault", line) for line in lines]
