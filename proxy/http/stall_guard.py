"""Closes stalled connections: requests that never complete, and answers that the client does not read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from aiohttp import web
from aiohttp.typedefs import Handler
from structlog.typing import FilteringBoundLogger

from interpretops.settings import GatewaySettings
from proxy.observe.metrics import Metrics

_EVERY_S: Final = 1.0


@dataclass
class _Watched:
    since: float
    """Time of its last progress."""
    request: web.Request | None = None
    """The request in progress, if any."""
    used: bool = False
    """Whether it has carried a request before."""
    taken: int = 0
    """Bytes of the answer that the client had read at the last progress."""


class StallGuard:
    """Checks every connection once a second, at no cost per chunk."""

    def __init__(
        self,
        settings: GatewaySettings,
        metrics: Metrics,
        log: FilteringBoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._idle_s = settings.body_timeout_s
        self._keepalive_s = settings.keepalive_s
        self._unread_s = settings.client_idle_timeout_s
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._watched: dict[asyncio.BaseProtocol, _Watched] = {}

    @web.middleware
    async def mark(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Middleware that records which connections have a request in progress."""
        watched = self._of(request.protocol)
        watched.request, watched.since, watched.taken, watched.used = request, self._clock(), 0, True
        try:
            return await handler(request)
        finally:
            watched.request, watched.since = None, self._clock()

    async def run(
        self,
        connections: Callable[[], Iterable[web.RequestHandler]],
        alive: Callable[[], None] = lambda: None,
    ) -> None:
        """Check all connections until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            open_now = list(connections())
            for connection in open_now:
                self.check(connection)
            for gone in self._watched.keys() - set(open_now):
                del self._watched[gone]
            alive()

    def check(self, connection: web.RequestHandler) -> None:
        """Close a connection that has made no progress for too long."""
        transport = connection.transport
        if transport is None or transport.is_closing():
            return
        watched, now = self._of(connection), self._clock()
        unread = transport.get_write_buffer_size()
        if watched.request is None:
            if now - watched.since > (self._keepalive_s if watched.used else self._idle_s):
                self._cut(transport, "no_request")
            return
        taken = watched.request.writer.output_size - unread
        if taken > watched.taken or not unread:
            watched.taken, watched.since = taken, now
        elif now - watched.since > self._unread_s:
            self._cut(transport, "unread_answer")

    def _of(self, connection: asyncio.BaseProtocol) -> _Watched:
        found = self._watched.get(connection)
        if found is None:
            found = self._watched[connection] = _Watched(self._clock())
        return found

    def _cut(self, transport: asyncio.Transport, reason: str) -> None:
        self._metrics.connections_cut.labels(reason).inc()
        self._log.info("connection_cut", reason=reason)
        if reason == "no_request":
            # No answer is pending: close gracefully, for clients that keep the connection for later.
            transport.close()
        else:
            transport.abort()
