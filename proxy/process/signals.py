"""Signal handling: SIGTERM and SIGINT stop the gateway within a time limit; SIGHUP reloads it."""

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
"""Time limit for stopping the engine and writing records and spans, after the grace period of requests."""
_THREADS_END_S: Final = 3.0
"""Longest wait for threads that still read or write files when everything else has ended."""


class Signals:
    """The signal handlers of a running gateway."""

    def __init__(self, grace_s: float) -> None:
        self.stop = asyncio.Event()
        self.reload = asyncio.Event()
        """Set by SIGHUP; the task that handles it clears it."""
        self._within_s = grace_s + _ENGINE_END_S
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._had_terminal = not ignored and _has_terminal()

    def install(self) -> None:
        """Install the handlers, for the rest of the process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._asked_to_stop)
            # In addition to the loop's handler, which does not run while the loop hangs.
            signal.signal(number, self._bound)
        loop.add_signal_handler(signal.SIGHUP, self._hung_up)

    def _asked_to_stop(self) -> None:
        if self.stop.is_set():
            # Second signal: exit at once. The engine's reaper notices and ends the engine.
            os._exit(FORCED_EXIT)
        self.stop.set()

    def _hung_up(self) -> None:
        if self._had_terminal and not _has_terminal():
            # Not a reload request: the terminal in which we were started was closed.
            self._asked_to_stop()
        else:
            self.reload.set()

    def _bound(self, _number: int, _frame: FrameType | None) -> None:
        end_within(self._within_s)


def end_within(seconds: float, status: int = FORCED_EXIT) -> None:
    """Kill the process after ``seconds`` if it is still running, and report where its threads are."""

    def wait() -> None:
        time.sleep(seconds)
        write_stderr(f"did not stop within {seconds:g} s; exiting. {_thread_stacks(lambda _thread: True)}")
        os._exit(status)

    threading.Thread(target=wait, name="last resort", daemon=True).start()


def end_threads(prefix: str) -> None:
    """Wait briefly for a pool's threads. If one hangs, exit the process: Python would wait for it forever.

    Call it when everything else has ended.
    """
    end = time.monotonic() + _THREADS_END_S
    for thread in threading.enumerate():
        if thread.name.startswith(prefix):
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                hanging = _thread_stacks(lambda each: each.name.startswith(prefix))
                write_stderr(f"stopped; abandoned threads that still hang: {hanging}")
                os._exit(0)


def write_stderr(line: str) -> None:
    """Write a line to standard error, even when nothing else works."""
    os.write(sys.stderr.fileno(), f"{line}\n".encode())


def _thread_stacks(chosen: Callable[[threading.Thread], bool]) -> str:
    frames = sys._current_frames()
    stacks = [
        f"{thread.name}: {frame.f_code.co_qualname}:{frame.f_lineno}"
        for thread in threading.enumerate()
        if chosen(thread)
        and thread is not threading.current_thread()
        and (frame := frames.get(thread.ident or 0)) is not None
    ]
    return "; ".join(stacks)


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
