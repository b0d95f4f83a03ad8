"""A circuit breaker: after several failures in a row, skips an engine for a while, then tries it once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal


class Breaker:
    """Counts failures in a row. Closed: all requests pass; open: none; half open: one, as a probe."""

    def __init__(self, failures: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = failures
        self._open_s = open_s
        self._clock = clock
        self._failures = 0
        self._until = 0.0
        self._probing = False

    @property
    def state(self) -> Literal["closed", "open", "half_open"]:
        """For the admin API and metrics."""
        if self._failures < self._limit:
            return "closed"
        return "half_open" if self._clock() >= self._until else "open"

    @property
    def allows(self) -> bool:
        """Whether a request may be sent now."""
        return self._failures < self._limit or (not self._probing and self._clock() >= self._until)

    def begin(self) -> None:
        """A request is being sent."""
        self._probing = self._failures >= self._limit

    def worked(self) -> None:
        """A request succeeded."""
        self._failures, self._probing = 0, False

    def failed(self) -> None:
        """The engine was unreachable, or failed during a request."""
        self._failures += 1
        self._until, self._probing = self._clock() + self._open_s, False

    def undecided(self) -> None:
        """A request ended without showing whether the engine works; for example, its client disconnected."""
        self._probing = False
