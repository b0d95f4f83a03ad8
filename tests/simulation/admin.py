"""One call to the gateway's admin routes, over the simulated network."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httptools

from simulation.network import Network

ADMIN = "/simulated/admin.sock"
_PATIENCE_S = 120.0


class _Reply(asyncio.Protocol):
    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.body = b""
        self.status = 0

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.status = 0
            self.done.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if not self.done.done():
            self.done.set_result(None)


async def call(
    network: Network, address: str, method: str, path: str, body: Any = None, key: str | None = None
) -> tuple[int, Any]:
    """Status and parsed body; status 0 if there was no response."""
    try:
        transport, protocol = await network.connect(address, _Reply)
    except OSError:
        return 0, None
    assert isinstance(protocol, _Reply)
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    lines += [f"Content-Length: {len(data)}", "", ""]
    transport.write("\r\n".join(lines).encode() + data)
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await protocol.done
    except TimeoutError:
        protocol.status = 0
    transport.close()
    try:
        return protocol.status, json.loads(protocol.body)
    except ValueError:
        return protocol.status, None
