"""A job asked to stop (SIGINT, SIGTERM) ends at the next safe place, with what it has done on disk."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from discovery.errors import DiscoveryError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(DiscoveryError):  # noqa: N818 (an order, not a fault)
    """The job was asked to stop and did; running the same command again goes on."""


class Stop:
    """Whether somebody asked."""

    def __init__(self) -> None:
        self.asked: str | None = None

    def hear(self, number: int, _frame: FrameType | None) -> None:
        """Remember the first signal; a second one interrupts at once."""
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def check(self, done: str) -> None:
        """Raise `Stopped` if asked to stop; ``done`` says what stands."""
        if self.asked is not None:
            raise Stopped(f"stopped by {self.asked}: {done}; run the same command again to go on")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within the block SIGINT and SIGTERM ask instead of ending the process (in the main thread)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.hear) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(stands: str) -> Iterator[None]:
    """Within the block SIGTERM interrupts as SIGINT does, and either ends in one line with what ``stands``.

    For jobs that keep each finished step: what was begun is lost, what was opened is closed on the way out.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [signal.SIGINT.name]

    def terminate(number: int, _frame: FrameType | None) -> None:
        heard.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as order:
        raise Stopped(f"stopped by {heard[-1]}: {stands}; run the same command again to go on") from order
    finally:
        signal.signal(signal.SIGTERM, before)
