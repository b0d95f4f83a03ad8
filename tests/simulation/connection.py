"""The client end of a connection: sends bytes, and reads answers in request order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import httptools

from simulation.asks import Ask
from simulation.network import Endpoint


class ClientConnection(asyncio.Protocol):
    """Every request sent gets an answer, or a notice that none will come."""

    def __init__(self, ended: Callable[[Ask], None]) -> None:
        self._ended = ended
        self._waiting: deque[Ask] = deque()
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self.transport: Endpoint
        self.open = False
        self.quiet = asyncio.Event()
        """Set while no answer is awaited."""
        self.quiet.set()

    def connection_made(self, transport: Any) -> None:
        self.transport, self.open = transport, True

    def expect(self, ask: Ask) -> None:
        """Register a request that is about to be sent."""
        ask.sent_at = self._loop.time()
        self._waiting.append(ask)
        self.quiet.clear()

    def send(self, ask: Ask) -> None:
        """Send a whole request at once."""
        self.expect(ask)
        self.transport.write(b"".join(ask.bytes()))
        ask.whole_at = ask.sent_at

    def leave(self) -> None:
        """Disconnect abruptly."""
        for ask in self._waiting:
            ask.left = True
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        while self._waiting:
            ask = self._waiting.popleft()
            ask.cut = True
            self._end(ask)
        self.quiet.set()

    def data_received(self, data: bytes) -> None:
        if not self._waiting:
            return
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._waiting[0].headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self._waiting[0].status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._waiting[0].body += body

    def on_message_complete(self) -> None:
        ask = self._waiting.popleft()
        ask.whole = True
        self._end(ask)
        if not self._waiting:
            self.quiet.set()

    def _end(self, ask: Ask) -> None:
        ask.ended_at = self._loop.time()
        self._ended(ask)
