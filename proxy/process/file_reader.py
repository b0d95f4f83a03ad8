"""Reads files outside the event loop and its thread pool, since a file system can hang forever."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, Final, ParamSpec, TypeVar

from interpretops.errors import InterpretOpsError

_TIMEOUT_S: Final = 30.0

P = ParamSpec("P")
T = TypeVar("T")


class StuckError(InterpretOpsError):
    """A read did not finish in time; callers continue without it."""


class Reader:
    """Runs one piece of work at a time in a daemon thread. Work that hangs blocks no other reader, nor exit.

    The event loop's own pool would fill up after a few hanging reads, and Python waits for it at exit.
    """

    def __init__(self, what: str, timeout_s: float = _TIMEOUT_S) -> None:
        """``what``: name of the thing read, for error messages."""
        self._what = what
        self._timeout_s = timeout_s
        self._lock = asyncio.Lock()
        self._running: asyncio.Future[Any] | None = None
        self._stuck = False

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """The work's result. Raises what the work raises, and `StuckError` if it, or earlier work, hangs."""
        async with self._lock:
            before = self._running
            if before is not None and not before.done():
                if self._stuck:
                    raise self._error()
                # Earlier work whose caller was cancelled.
                await self._wait(before)
            self._stuck = False
            running = asyncio.get_running_loop().run_in_executor(_THREADS, work, *arguments)
            # Retrieve its error, since nobody may be waiting for it any more.
            running.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
            self._running = running
            await self._wait(running)
            return running.result()

    async def _wait(self, running: asyncio.Future[Any]) -> None:
        await asyncio.wait({running}, timeout=self._timeout_s)
        if not running.done():
            self._stuck = True
            raise self._error()

    def _error(self) -> StuckError:
        return StuckError(
            f"{self._what}: could not be read within {self._timeout_s:g} s; the file system may be hanging"
        )


class _DaemonThreads(Executor):
    """One thread per piece of work. Nothing waits for these threads at exit."""

    def submit(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            future.set_running_or_notify_cancel()
            try:
                future.set_result(work(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        # Named like the pool's threads, so that `end_threads` reports it if it hangs.
        threading.Thread(target=run, name="pool-reader", daemon=True).start()
        return future


_THREADS: Final = _DaemonThreads()
