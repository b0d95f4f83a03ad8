"""SIGINT and SIGTERM stop a job at the next safe point, with all finished work on disk."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from discovery.errors import DiscoveryError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(DiscoveryError):  # noqa: N818 (not an error)
    """A signal stopped the job; the same command resumes it."""


class Stop:
    """Whether a signal has asked the job to stop."""

    def __init__(self) -> None:
        self.asked: str | None = None

    def record(self, number: int, _frame: FrameType | None) -> None:
        """Record the first signal; a second one interrupts at once."""
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name

    def check(self, done: str) -> None:
        """Raise `Stopped` if asked to stop; ``done`` says what is on disk."""
        if self.asked is not None:
            raise Stopped(f"stopped by {self.asked}: {done}; run the same command again to resume")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Within the block, SIGINT and SIGTERM set `Stop.asked` and do not end the process (main thread only)."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.record) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(stands: str) -> Iterator[None]:
    """Within the block, SIGTERM interrupts as SIGINT does, and either raises `Stopped`.

    For jobs that write each finished step to disk: the current step is lost, and open resources are closed.

    stands  what is on disk, for the message
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = [signal.SIGINT.name]

    def terminate(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except KeyboardInterrupt as order:
        raise Stopped(f"stopped by {received[-1]}: {stands}; run the same command again to resume") from order
    finally:
        signal.signal(signal.SIGTERM, before)
