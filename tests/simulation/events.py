"""Events that engines report to the rest of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from simulation.engine import Generation


@dataclass
class Events:
    """The events that invariants observe."""

    step: Callable[[str], None]
    """Something happened after which invariants should be checked."""
    began: Callable[[Generation], None]
    """An engine started a generation."""
    not_resident: Callable[[str, Callable[[], bool]], None]
    """An engine refused a request because its revision is not resident; and whether that connection was
    cut."""
    sent: Callable[[str], object]
    """A request was sent to an engine, perhaps after another had refused it."""
    engine_connections: list[Any] = field(default_factory=list)
    """Generations in progress, of all engines."""

    def ended(self, generation: Generation) -> None:
        """A generation ended or was aborted."""
        self.step(f"generation {generation.number} ends")
