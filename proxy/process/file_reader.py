"""Reads files beside the event loop and beside its pool, since a file system can hang for ever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Final, ParamSpec, TypeVar

from interpretops.errors import InterpretOpsError

_PATIENCE_S: Final = 30.0

P = ParamSpec("P")
T = TypeVar("T")


class StuckError(InterpretOpsError):
    """What was to be read does not come; whoever waits for it goes on without."""


class Reader:
    """Runs work in a daemon thread, one at a time. One that hangs holds up no other work, and no exit.

    The loop's own pool would be full after a few reads that hang, and is waited for at the end.
    """

    def __init__(self, what: str, patience_s: float = _PATIENCE_S) -> None:
        """``what`` is read, as errors say it."""
        self._what = what
        self._patience_s = patience_s
        self._turn = asyncio.Lock()
        self._running: asyncio.Future[Any] | None = None
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
            running = asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)
            # Its error, too, may come when nobody waits for it any more.
            running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            self._running = running
            await self._wait(running)
            return running.result()

    async def _wait(self, running: asyncio.Future[Any]) -> None:
        await asyncio.wait({running}, timeout=self._patience_s)
        if not running.done():
            self._stuck = True
            raise self._error()

    def _error(self) -> StuckError:
        return StuckError(
            f"{self._what}: could not be read within {self._patience_s:g} s; the file system may hang"
        )


class _DaemonThreads(Executor):
    """A thread of its own for each piece of work; nobody waits for them at the process's end."""

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            future.set_running_or_notify_cancel()
            try:
                future.set_result(work(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        # Told of at the end, where it hangs, as threads of the pool are.
        threading.Thread(target=run, name="pool-reader", daemon=True).start()
        return future


_THREADS: Final = _DaemonThreads()
