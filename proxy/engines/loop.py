"""Keeps one engine running: starts it, waits until it responds, proves it, watches it, and restarts it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from interpretops.errors import EngineError
from interpretops.settings import Settings
from proxy.engines.client import EngineClient
from proxy.engines.link import EngineLink, EngineReplacedError, ProvenEngine
from proxy.engines.local_engine import LocalEngine
from proxy.observe.metrics import Metrics
from proxy.observe.supervisor import Alive, first_of

_POLL_S = 0.25
_WATCH_EVERY_S = 1.0
_ATTEST_EVERY = 5
"""Every check asks the health route; every fifth, and each after a miss, also asks the plugin."""
_ATTEST_S = 20.0
"""Longest wait for the plugin before the next health check. An engine whose workers hang still reports itself
as healthy; only its plugin is silent. A long step looks the same: `engine.silence_timeout_s` decides."""
_CONTROL_S = 60.0
"""Loading a plan waits for the current step, and then takes time itself."""
_MISSES = 3
_BACKOFF_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)
_STABLE_S = 60.0


class Engine(Protocol):
    """A local or remote engine."""

    own: bool
    """Whether no other process can ever answer at its address."""

    @property
    def address(self) -> str: ...
    async def start(self) -> None: ...
    async def wait_gone(self) -> str: ...
    async def stop(self) -> None: ...


class RemoteEngine:
    """An engine started elsewhere. It can be replaced by another process unnoticed."""

    own: bool = False

    def __init__(self, url: str) -> None:
        self.address = url

    async def start(self) -> None:
        """Nothing to start."""

    async def wait_gone(self) -> str:
        """Never returns: a remote engine's end is only noticed by health checks."""
        await asyncio.Event().wait()
        raise AssertionError

    async def stop(self) -> None:
        """Nothing to stop."""


def make_engine(settings: Settings, url: str | None, model: Path | None) -> Engine:
    """The engine at an address of `engine.url`; None: start one here."""
    if url is not None:
        return RemoteEngine(url)
    assert model is not None
    # One log per port, so that several gateways can share a cache.
    name = f"engine-{settings.gateway.port}.log"
    return LocalEngine(settings, model, settings.cache.dir.expanduser() / "logs" / name)


@dataclass(frozen=True)
class EngineDependencies:
    """Dependencies shared by the loops of all engines."""

    settings: Settings
    make: Callable[[str | None], Engine]
    """Makes an engine at an address; None: starts one here."""
    prepare: Callable[[ProvenEngine], Awaitable[None]]
    """Loads all plans into an engine that passed its self-test."""
    restore: Callable[[], Awaitable[None]]
    """Reloads plans that an engine has lost."""
    metrics: Metrics
    log: FilteringBoundLogger
    progress: Callable[[str], None]
    holder: str
    """Identifies this gateway to the engines, which keep a plan as long as any gateway holds it."""


class EngineLoop:
    """Runs one engine, restarting it, or the engines at one address in succession, until cancelled."""

    def __init__(
        self,
        url: str | None,
        link: EngineLink,
        deps: EngineDependencies,
        ready: asyncio.Event,
        should_give_up: Callable[[str], bool],
    ) -> None:
        self._url = url
        self._link = link
        self._settings = deps.settings
        self._deps = deps
        self._metrics = deps.metrics
        self._log = deps.log
        self._ready = ready
        self._should_give_up = should_give_up

    async def run(self, alive: Alive) -> None:
        """Never returns. Raises `EngineError` when the engine does not start and ``should_give_up``."""
        failures = 0
        while True:
            began = time.monotonic()
            try:
                reason = await self._live(alive)
            except EngineError as error:
                if self._should_give_up(self._link.name):
                    raise
                reason = str(error)
                self._link.reason = reason
            failures = 0 if time.monotonic() - began > _STABLE_S else failures + 1
            delay_s = _BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)]
            self._log.error("engine_restart", engine=self._link.name, reason=reason, delay_s=delay_s)
            await asyncio.sleep(delay_s)

    async def _live(self, alive: Alive) -> str:
        """Run one engine until it ends; returns why it ended."""
        engine = self._deps.make(self._url)
        client: EngineClient | None = None
        try:
            await engine.start()
            self._metrics.engine_starts.inc()
            client = EngineClient(
                engine.address,
                connect_timeout_s=self._settings.gateway.connect_timeout_s,
                control_timeout_s=max(_CONTROL_S, self._settings.engine.silence_timeout_s),
                holder=self._deps.holder,
            )
            which, reason = await first_of(engine.wait_gone(), self._serve(engine, client, alive))
            self._link.lose(reason, gone=True)
            if which == 0:
                raise EngineError(reason)
        except asyncio.CancelledError:
            self._link.lose("the gateway is stopping", gone=True, planned=True)
            raise
        finally:
            self._link.lose("the engine was lost and is being restarted", gone=True)
            if client is not None:
                await client.close()
            await engine.stop()
        return reason

    async def _serve(self, engine: Engine, client: EngineClient, alive: Alive) -> str:
        await self._wait_healthy(client)
        await self._link.prove(client, engine.own, self._deps.prepare, self._deps.progress)
        self._ready.set()
        alive()
        return await self._watch()

    async def _wait_healthy(self, client: EngineClient) -> None:
        timeout_s = self._settings.engine.startup_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                while not await client.healthy():  # noqa: ASYNC110 - another process's state
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            raise EngineError(
                f"the engine did not respond within engine.startup_timeout_s = {timeout_s:g}; "
                "raise it, or see the engine's log"
            ) from None

    async def _watch(self) -> str:
        """Check periodically that the proven engine is alive and the same; returns why it is not."""
        missed = checks = 0
        silent = False
        silence_s, last_answer = self._settings.engine.silence_timeout_s, time.monotonic()
        while True:
            engine = self._link.joined
            if engine is None:
                return self._link.reason
            reload_needed = await _wait_for(engine.reload_needed, _WATCH_EVERY_S)
            if self._link.joined is not engine:
                continue
            checks += 1
            try:
                if reload_needed:
                    engine.reload_needed.clear()
                    self._log.error("revisions_missed", engine=self._link.name)
                    await self._deps.restore()
                await engine.client.check_health()
                if missed or silent or checks % _ATTEST_EVERY == 0:
                    async with asyncio.timeout(min(_ATTEST_S, silence_s)):
                        lost = await engine.check_resident()
                    silent, last_answer = False, time.monotonic()
                    if lost:
                        self._log.error("revisions_lost", engine=self._link.name, revisions=lost)
                        await self._deps.restore()
                missed = 0
            except EngineReplacedError as error:
                return str(error)
            except TimeoutError:
                # The health check passed, so the count of consecutive misses restarts.
                silent, missed = True, 0
                if time.monotonic() - last_answer >= silence_s:
                    return (
                        f"the engine's workers were silent for engine.silence_timeout_s = {silence_s:g}; "
                        "raise it if one step can take that long, or lower --max-num-batched-tokens "
                        "in engine.extra_args"
                    )
            except EngineError as error:
                missed += 1
                if missed >= _MISSES:
                    return f"the engine stopped responding: {error}"


async def _wait_for(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event is set within the given time."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False
