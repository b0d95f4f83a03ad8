"""Starts all tasks of the gateway. Logs and counts failures, and restarts permanent tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from structlog.typing import FilteringBoundLogger

from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Reason
from proxy.observe.unforeseen_error import describe_error

KEPT: Final = {
    "readiness": True,
    "policies": True,
    "policy notifications": False,
    "keys": True,
    "certificates": False,
    "reloads": False,
    "audit": True,
    "budgets": True,
    "shared limits": True,
    "stalls": True,
    "engines": True,
    "engine": False,
    "canary": False,
    "transcripts": False,
    "retention": False,
}
"""Permanent tasks, and whether they enforce something: the gateway is not ready while an enforcing task keeps
failing. When an `engine` task fails, its engine takes no requests."""
BRIEF: Final = ("audit sync", "free revision", "settlement", "shadow", "engine leaves")
"""Short tasks that end by themselves."""
STRAY: Final = "stray"
"""Name for errors that the event loop reports: of callbacks, and of tasks started by libraries."""
_DELAYS_S: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_IN_A_ROW: Final = 3
"""Failures in a row, with no successful iteration between them, after which a task counts as down."""

T = TypeVar("T")
Alive = Callable[[], None]
"""Called by a permanent task after each successful iteration."""


class Supervisor:
    """All tasks of one gateway. Their names are metric labels."""

    def __init__(
        self,
        metrics: Metrics,
        log: FilteringBoundLogger,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._metrics = metrics
        self._log = log
        self._pause = pause
        self._running: set[asyncio.Task[Any]] = set()
        self._down: dict[asyncio.Task[Any], str] = {}
        for name in (*KEPT, *BRIEF, STRAY):
            metrics.task_failures.labels(name)
        for name in KEPT:
            metrics.task_down.labels(name).set_function(partial(self._is_down, name))

    @property
    def down(self) -> list[str]:
        """The enforcing tasks that keep failing."""
        return sorted({name for name in self._down.values() if KEPT[name]})

    def not_ready(self) -> Iterator[Reason]:
        """Enforcing tasks that keep failing: nothing may be served without them."""
        if down := self.down:
            yield Reason("task_down", f"tasks keep failing, see `task_failed` in the log: {', '.join(down)}")

    def _is_down(self, name: str) -> bool:
        return name in self._down.values()

    def keep(
        self,
        name: str,
        run: Callable[[Alive], Awaitable[None]],
        *,
        ends_with: tuple[type[Exception], ...] = (),
    ) -> asyncio.Task[None]:
        """Run a task until it is cancelled. Restart it, after a pause, whenever it ends otherwise.

        name       one of `KEPT`
        ends_with  exceptions that end it for good and are raised to whoever awaits it
        """
        assert name in KEPT, name
        return self._start(name, self._keep(name, run, ends_with))

    def spawn(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a task once. Logs and counts its exception even if nobody awaits it.

        name  one of `BRIEF`
        """
        assert name in BRIEF, name
        task = self._start(name, work)
        task.add_done_callback(self._note_end)
        return task

    def on_loop_exception(self, _loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The event loop's exception handler."""
        error = context.get("exception")
        # With an exception present, the message may quote call arguments.
        facts = {"error": context.get("message")} if error is None else describe_error(error)
        self._count(STRAY, facts)

    async def _keep(
        self, name: str, run: Callable[[Alive], Awaitable[None]], ends_with: tuple[type[Exception], ...]
    ) -> None:
        task, failures = asyncio.current_task(), 0
        assert task is not None

        def alive() -> None:
            nonlocal failures
            failures = 0
            if self._down.pop(task, None) is not None:
                self._log.info("task_recovered", task=name)

        try:
            while True:
                try:
                    await run(alive)
                    facts: dict[str, Any] = {"kind": "returned"}
                except ends_with:
                    raise
                except asyncio.CancelledError as error:
                    if task.cancelling():
                        raise
                    # Something it awaited was cancelled, not the task itself.
                    facts = describe_error(error)
                except Exception as error:
                    facts = describe_error(error)
                delay_s = _DELAYS_S[min(failures, len(_DELAYS_S) - 1)]
                failures += 1
                self._count(name, {**facts, "in_a_row": failures, "again_in_s": delay_s})
                if failures == _IN_A_ROW:
                    self._down[task] = name
                    self._log.error("task_down", task=name, enforces=KEPT[name])
                await self._pause(delay_s)
        finally:
            self._down.pop(task, None)

    def _start(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work, name=name)
        # The event loop only holds weak references to tasks.
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._count(task.get_name(), describe_error(error))

    def _count(self, name: str, facts: dict[str, Any]) -> None:
        self._metrics.task_failures.labels(name).inc()
        self._log.error("task_failed", task=name, **facts)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks and wait until they end. Their errors have already been logged."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def first_of(*works: Coroutine[Any, Any, T]) -> tuple[int, T]:
    """Run coroutines concurrently until one ends, then cancel the others. Returns its index and result.

    If several have ended, the first in argument order counts. Raises what that one raised.
    """
    tasks = [asyncio.create_task(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        pending = [task for task in tasks if not task.done()]
        await end(*pending)
    index = next(index for index, task in enumerate(tasks) if task not in pending)
    for task in tasks[index + 1 :]:
        if task not in pending and not task.cancelled():
            task.exception()  # Retrieved, so that asyncio does not report it.
    return index, tasks[index].result()
