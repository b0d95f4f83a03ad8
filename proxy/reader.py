"""Reads files beside the event loop and beside its pool, since a file system can hang for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Final, TypeVar

from interpretops.errors import InterpretOpsError

_PATIENCE_S: Final = 30.0

T = TypeVar("T")


class StuckError(InterpretOpsError):
    """What was to be read does not come; whoever waits for it goes on without."""


class Reader:
    """Runs work in a daemon thread, one at a time. One that hangs holds up no other work, and no exit.

    The loop's own pool would be full after a few reads that hang, and is waited for at the end.
    """

    def __init__(self, what: str, patience_s: float = _PATIENCE_S) -> None:
        """``what`` is read, as errors and the thread's name say it."""
        self._what = what
        self._patience_s = patience_s
        self._turn = asyncio.Lock()
        self._running: Future[Any] | None = None
        self._stuck = False

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """The work's result. Raises what it raises, and `StuckError` when it, or the work before, hangs."""
        async with self._turn:
            before = self._running
            if before is not None and not before.done():
                if self._stuck:
                    raise self._error()
                # Whoever waited for it was cancelled.
                await self._wait(before)
            self._stuck = False
            future: Future[T] = Future()
            self._running = future
            threading.Thread(
                target=_run, args=(future, work, arguments), name=f"read {self._what}", daemon=True
            ).start()
            await self._wait(future)
            return future.result()

    async def _wait(self, future: Future[Any]) -> None:
        ended = asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)
        await asyncio.wait({ended}, timeout=self._patience_s)
        if not future.done():
            self._stuck = True
            raise self._error()

    def _error(self) -> StuckError:
        return StuckError(
            f"{self._what}: could not be read within {self._patience_s:g} s; the file system may hang"
        )


def _run(future: Future[T], work: Callable[..., T], arguments: tuple[Any, ...]) -> None:
    future.set_running_or_notify_cancel()
    try:
        future.set_result(work(*arguments))
    except BaseException as error:
        future.set_exception(error)
