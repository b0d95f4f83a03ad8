"""An event loop without sockets, threads or waiting; its time is the virtual clock's."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable, Coroutine
from typing import Any

from simulation.clock import Clock

DEADLOCK = "nothing is left to happen, and the simulation has not ended"


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs what is ready in order; when nothing is, time jumps to the next timer."""

    def __init__(self, clock: Clock, chance: random.Random) -> None:
        super().__init__()
        self._clock = clock
        self._chance = chance
        self._selector = _Selector(clock)
        self._serials = itertools.count()
        self.network: Any = None
        """Opens connections: a `Network`."""
        self.before_thread: Callable[[], None] = lambda: None
        """Called when the gateway submits work to a thread; may raise, like a pool that cannot start
        threads."""
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._clock.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:  # type: ignore[override]
        """Run a function slightly later, in the same thread."""
        self.before_thread()
        future = self.create_future()
        # Usually at once; sometimes the thread must wait.
        delay_s = self._chance.choice((0.0, 0.001, 0.001, 0.02, 0.2))
        self.call_later(delay_s, self._run_now, future, func, args)
        return future

    def _run_now(self, future: asyncio.Future[Any], func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            result = func(*args)
        except Exception as error:
            if not future.cancelled():
                future.set_exception(error)
        else:
            if not future.cancelled():
                future.set_result(result)

    async def create_unix_connection(
        self, protocol_factory: Callable[[], Any], path: Any = None, **_: Any
    ) -> Any:
        """Connect to a simulated listener."""
        return await self.network.connect(str(path), protocol_factory)

    async def create_connection(self, protocol_factory: Callable[[], Any], *_: Any, **__: Any) -> Any:
        raise OSError("the simulation has no TCP")

    def _make_task(self, loop: Any, coro: Any, **options: Any) -> Any:
        return _Task(next(self._serials), coro, loop=loop, **options)

    def _process_events(self, event_list: Any) -> None:
        """There are no external events."""

    def _write_to_self(self) -> None:
        """Nothing sleeps, so there is nothing to wake."""


class _Selector:
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def select(self, timeout: float | None) -> tuple[()]:
        if timeout is None:
            raise RuntimeError(DEADLOCK)
        self._clock.advance(timeout)
        return ()


class _Task(asyncio.Task[Any]):
    """A task whose hash does not depend on its address."""

    def __init__(self, serial: int, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        self._serial = serial
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._serial

    def __eq__(self, other: object) -> bool:
        return self is other
