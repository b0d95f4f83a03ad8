"""Virtual time: it stands still while code runs, and jumps to the next timer when nothing is ready."""

from __future__ import annotations

import datetime as real
import time
from collections.abc import Callable

_BEGINS: float = 1_790_000_000.0
"""Wall-clock time at the start of every simulation."""


class Clock:
    """A monotonic clock, and a wall clock that can be set."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._wall_shift = _BEGINS - self.now

    def monotonic(self) -> float:
        """As `time.monotonic`."""
        return self.now

    def time(self) -> float:
        """As `time.time`."""
        return self.now + self._wall_shift

    def advance(self, seconds: float) -> None:
        """Advance the time."""
        self.now += seconds

    def set_wall(self, seconds: float) -> None:
        """Set the wall clock forward or back; the monotonic clock is unaffected."""
        self._wall_shift += seconds


def datetime_by(clock: Clock) -> type[real.datetime]:
    """A `datetime` whose `now` is the virtual one."""

    class VirtualDatetime(real.datetime):
        @classmethod
        def now(cls, tz: real.tzinfo | None = None) -> real.datetime:  # type: ignore[override]
            return real.datetime.fromtimestamp(clock.time(), tz)

    return VirtualDatetime


REAL_CLOCKS: dict[Callable[[], float], str] = {
    time.monotonic: "monotonic",
    time.perf_counter: "monotonic",
    time.time: "time",
}
"""Clock functions that code may have imported, and the `Clock` method that replaces each."""
