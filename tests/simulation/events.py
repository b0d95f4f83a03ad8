"""What the engines tell the rest of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simulation.engine import Generation


@dataclass
class Events:
    """Heard by the invariants."""

    step: Callable[[str], None]
    """Something happened that a check should follow."""
    began: Callable[[Generation], None]
    """An engine began to generate."""
    not_resident: Callable[[str, Callable[[], bool]], None]
    """An engine refused an ask since it does not hold its revision; and whether that connection was cut."""
    sent: Callable[[str], object]
    """An ask was sent to an engine, perhaps after another had refused it."""
    engine_connections: list[Any] = field(default_factory=list)
    """Open ones, of all engines."""

    def ended(self, generation: Generation) -> None:
        """A generation ended, or was given up."""
        self.step(f"generation {generation.number} ends")
