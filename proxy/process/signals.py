"""What signals mean: SIGTERM and SIGINT end the gateway, within a bound whatever hangs; SIGHUP reloads it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

FORCED_EXIT: Final = 130
_ENGINE_END_S: Final = 25.0
"""Longest that the engine's end, records and spans take, after the requests' own grace."""
_THREADS_END_S: Final = 3.0
"""Longest wait for threads that still read or write a file when all else has ended."""


class Signals:
    """The signals of a running gateway."""

    def __init__(self, grace_s: float) -> None:
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        """Set by SIGHUP; who takes it clears it."""
        self._within_s = grace_s + _ENGINE_END_S
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._had_terminal = not ignored and _has_terminal()

    def take(self) -> None:
        """From now on until the process ends."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_stop)
            # Beside the loop's own handler, which does nothing while the loop itself hangs.
            signal.signal(number, self._bound)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)

    def _asked_to_stop(self) -> None:
        if self.stop.is_set():
            # Asked twice: go at once. The engine's reaper sees us gone and ends the engine.
            os._exit(FORCED_EXIT)
        self.stop.set()

    def _hung_up(self) -> None:
        if self._had_terminal and not _has_terminal():
            # Not a request: the terminal that it was started in was closed.
            self._asked_to_stop()
        else:
            self.reload.set()

    def _bound(self, _number: int, _frame: FrameType | None) -> None:
        end_within(self._within_s)


def end_within(seconds: float, status: int = FORCED_EXIT) -> None:
    """End the process after ``seconds`` unless it has ended; say which threads still run and where."""

    def wait() -> None:
        time.sleep(seconds)
        tell(f"did not end within {seconds:g} s; ending now. {_where_threads_stand(lambda _thread: True)}")
        os._exit(status)

    threading.Thread(target=wait, name="last resort", daemon=True).start()


def end_threads(prefix: str) -> None:
    """Wait a moment for threads of a pool; end the process when one hangs, since Python would wait for ever.

    To be called when all else has ended.
    """
    end = time.monotonic() + _THREADS_END_S
    for thread in threading.enumerate():
        if thread.name.startswith(prefix):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                hanging = _where_threads_stand(lambda each: each.name.startswith(prefix))
                tell(f"ended; what still hangs is left behind. {hanging}")
                os._exit(0)


def tell(line: str) -> None:
    """On standard error, also when nothing else works any more."""
    os.write(sys.stderr.fileno(), f"{line}\n".encode())


def _where_threads_stand(wanted: Callable[[threading.Thread], bool]) -> str:
    frames = sys._current_frames()
    told = [
        f"{thread.name}: {frame.f_code.co_qualname}:{frame.f_lineno}"
        for thread in threading.enumerate()
        if wanted(thread)
        and thread is not threading.current_thread()
        and (frame := frames.get(thread.ident or 0)) is not None
    ]
    return "; ".join(told)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
