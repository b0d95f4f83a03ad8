"""Maintains the fleet: one loop per engine in the settings, or per address of a DNS name."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit

from interpretops.errors import EngineError
from proxy.engines.fleet import Fleet
from proxy.engines.link import EngineLink
from proxy.engines.loop import EngineDependencies, EngineLoop
from proxy.observe.supervisor import Alive, Supervisor, end

LOCAL: Final = "local"
"""Name of the engine that this gateway starts."""
_DNS: Final = "dns+"
_RESOLVE_EVERY_S: Final = 5.0
_IDLE_POLL_S: Final = 0.2


class FleetLoop:
    """Runs until cancelled. Adds and removes engines as DNS answers change."""

    def __init__(self, fleet: Fleet, deps: EngineDependencies, supervisor: Supervisor) -> None:
        self._fleet = fleet
        self._supervisor = supervisor
        self._deps = deps
        self._urls = deps.settings.engine.url
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._failed: set[str] = set()
        self._resolved: dict[str, tuple[str, ...]] = {}
        self._unresolved: dict[str, str] = {}
        """DNS names that cannot be resolved now, and why."""
        deps.metrics.engines_unresolved.set_function(lambda: bool(self._unresolved))
        self.first_ready = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        """The task that runs `run`; set by its starter."""

    async def run(self, alive: Alive) -> None:
        """Never returns. Raises `EngineError` if, at start-up, every engine of a fixed list fails.

        The engines' own tasks keep running when this one ends, until `close`.
        """
        while True:
            configured = await self._configured()
            for name in configured.keys() - self._tasks.keys():
                self._join(name, configured[name])
            for name in self._tasks.keys() - configured.keys():
                self._leave(name)
            alive()
            every_s = _RESOLVE_EVERY_S if self._grows else None
            done: set[asyncio.Task[None]] = set()
            if self._tasks:
                done, _ = await asyncio.wait(
                    self._tasks.values(), timeout=every_s, return_when=asyncio.FIRST_COMPLETED
                )
            else:
                await asyncio.sleep(_RESOLVE_EVERY_S)
            for task in done:
                task.result()

    async def close(self) -> None:
        """End the tasks of all engines, and the engines started by this gateway."""
        await end(*self._tasks.values(), *self._leaving)

    @property
    def _grows(self) -> bool:
        return any(url.startswith(_DNS) for url in self._urls)

    def _should_give_up(self, name: str) -> bool:
        self._failed.add(name)
        return not self.first_ready.is_set() and not self._grows and self._failed >= self._tasks.keys()

    def _join(self, name: str, url: str | None) -> None:
        loop = EngineLoop(url, self._fleet.add(name), self._deps, self.first_ready, self._should_give_up)
        self._tasks[name] = self._supervisor.keep("engine", loop.run, ends_with=(EngineError,))

    def _leave(self, name: str) -> None:
        """Send no new requests to an engine that is no longer listed, and end its task after the last one."""
        link, task = self._fleet.remove(name), self._tasks.pop(name)
        self._deps.log.info("engine_leaves", engine=name, outstanding=link.outstanding)
        leaving = self._supervisor.spawn("engine leaves", self._drain(link, task))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def _drain(self, link: EngineLink, task: asyncio.Task[None]) -> None:
        try:
            async with asyncio.timeout(self._deps.settings.gateway.request_timeout_s):
                while link.outstanding:  # noqa: ASYNC110 - counted per request, where an event would cost
                    await asyncio.sleep(_IDLE_POLL_S)
        except TimeoutError:
            pass
        finally:
            await end(task)

    async def _configured(self) -> Mapping[str, str | None]:
        """Name to address of every configured engine; None means: start it here."""
        if not self._urls:
            return {LOCAL: None}
        found: dict[str, str | None] = {}
        for url in self._urls:
            for address in await self._resolve(url) if url.startswith(_DNS) else (url,):
                found[address.split("://", 1)[1].rstrip("/")] = address
        return found

    async def _resolve(self, url: str) -> tuple[str, ...]:
        """All addresses of a DNS name. While it cannot be resolved, the last known ones."""
        parts = urlsplit(url.removeprefix(_DNS))
        port = parts.port or 80
        try:
            loop = asyncio.get_running_loop()
            answers = await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
        except OSError as error:
            if self._unresolved.get(url) != str(error):
                self._deps.log.warning("engines_not_resolved", url=url, error=str(error))
            self._unresolved[url] = str(error)
        else:
            if self._unresolved.pop(url, None) is not None:
                self._deps.log.info("engines_resolved", url=url)
            hosts = sorted({str(answer[4][0]) for answer in answers})
            self._resolved[url] = tuple(
                f"{parts.scheme}://{f'[{host}]' if ':' in host else host}:{port}" for host in hosts
            )
        return self._resolved.get(url, ())
