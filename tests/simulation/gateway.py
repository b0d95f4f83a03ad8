"""The real gateway, assembled as in `mechctl serve`, with in-memory connections instead of sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import MutableMapping
from typing import Any

import structlog

from interpretops.settings import Settings
from proxy.engines.loop import RemoteEngine
from proxy.gateway import Apps, make_app
from proxy.http.server import Runner
from simulation.admin import ADMIN
from simulation.clients import PUBLIC
from simulation.network import Network


class GatewayProcess:
    """One run of the gateway, from start to end."""

    def __init__(self, settings: Settings, network: Network, hear: Any) -> None:
        self.settings = settings
        self._network = network
        self._hear = hear
        self.apps: Apps
        self._runners: list[Runner] = []
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start listening. Raises `ConfigError` as the real one does."""
        logger = structlog.wrap_logger(None, processors=[self._note])
        self.apps = make_app(self.settings, lambda url: RemoteEngine(url or ""), logger)
        for app, leaves in ((self.apps.public, True), (self.apps.admin, False)):
            runner = Runner(
                app,
                self.apps.gateway.metrics,
                logger,
                handler_cancellation=leaves,
                shutdown_timeout=self.settings.gateway.shutdown_grace_s,
                access_log=None,
            )
            await runner.setup()
            self._runners.append(runner)
        stalls = self.apps.gateway.stall_guard
        self._watch = self.apps.gateway.supervisor.keep(
            "stalls", lambda alive: stalls.run(self._connections, alive)
        )
        for address, runner in zip((PUBLIC, ADMIN), self._runners, strict=True):
            assert runner.server is not None
            self._network.listeners[address] = runner.server

    async def stop(self) -> None:
        """Stop, as on SIGTERM."""
        for address in (PUBLIC, ADMIN):
            self._network.listeners.pop(address, None)
        for runner in self._runners:
            await runner.cleanup()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    def _connections(self) -> list[Any]:
        servers = [runner.server for runner in self._runners if runner.server is not None]
        return [connection for server in servers for connection in server.connections]

    def _note(self, _logger: Any, _method: str, event: MutableMapping[str, Any]) -> Any:
        with contextlib.suppress(RecursionError):
            self._hear({**event, "level": _method})
        raise structlog.DropEvent
