"""Stalled connections are closed, on real sockets; others are left alone."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import structlog
from aiohttp import web
from running_gateway import Start, Until

from interpretops.settings import load_settings
from proxy.http.stall_guard import StallGuard
from proxy.observe.metrics import Metrics

LOG = structlog.wrap_logger(None, processors=[structlog.testing.LogCapture()])
SMALL = 8192


class Clock:
    """A clock that the test advances."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
async def site() -> AsyncIterator[Any]:
    """A listener whose only route sends endlessly, its stall guard, and the guard's clock."""
    clock, metrics = Clock(), Metrics()
    settings = load_settings(
        overrides={"gateway.body_timeout_s": 5.0, "gateway.client_idle_timeout_s": 7.0}, environ={}
    ).gateway
    watch = StallGuard(settings, metrics, LOG, clock)
    ended = asyncio.Event()

    async def endless(request: web.Request) -> None:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x" * 65536)
        finally:
            ended.set()

    app = web.Application(middlewares=[watch.mark])
    app.router.add_get("/", endless)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()

    def look() -> int:
        for connection in runner.server.connections:
            watch.check(connection)
        return len(runner.server.connections)

    yield runner.addresses[0], look, clock, metrics, ended
    await runner.cleanup()


async def connect(
    address: tuple[str, int], until: Until, runner_look: Callable[..., Any], first: bytes = b""
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    raw.setblocking(False)
    await asyncio.get_running_loop().sock_connect(raw, address)
    reader, writer = await asyncio.open_connection(sock=raw, limit=SMALL)
    writer.write(first)
    await writer.drain()
    return reader, writer


async def closed(reader: asyncio.StreamReader) -> bool:
    try:
        return await asyncio.wait_for(reader.read(1), 5) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: "])
async def test_request_that_never_completes_is_closed(site: Any, until: Until, sent: bytes) -> None:
    """A connection that sends nothing, or endless headers, is closed, but not before the timeout."""
    address, look, clock, metrics, _ = site
    reader, writer = await connect(address, until, look, sent)

    async def arrived() -> bool:
        return look() == 1

    await until(arrived)
    clock.now += 4.9
    look()
    assert b'connections_cut_total{reason="no_request"}' not in metrics.render()
    writer.write(b"a")
    clock.now += 0.2
    look()
    assert await closed(reader)
    assert b'interpretops_connections_cut_total{reason="no_request"} 1.0' in metrics.render()
    writer.close()


async def test_unread_answer_is_closed(site: Any, until: Until) -> None:
    """A client that stops reading loses its connection and request; one that keeps reading keeps both."""
    address, look, clock, metrics, ended = site
    reader, writer = await connect(address, until, look, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    for _ in range(4):
        clock.now += 6.0
        look()
        for _ in range(100):
            await asyncio.wait_for(reader.read(65536), 5)
    assert not ended.is_set()
    async with asyncio.timeout(10):
        while not ended.is_set():
            clock.now += 3.0
            look()
            await asyncio.sleep(0.02)
    assert b'interpretops_connections_cut_total{reason="unread_answer"} 1.0' in metrics.render()
    writer.close()


async def test_connection_that_was_used_waits_longer_for_its_next_request(start: Start, until: Until) -> None:
    """The keep-alive time exceeds that of load balancers, which could otherwise send on a closing
    connection."""
    front = await start("calm")
    watch = front.apps.gateway.stall_guard
    clock = Clock()
    watch._clock = clock
    host, port = front.runners[0].addresses[0][:2]
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")

    def look() -> None:
        for connection in front.runners[0].server.connections:
            watch.check(connection)

    clock.now += 70
    look()
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
    clock.now += 76
    look()
    assert await closed(reader)
    writer.close()
