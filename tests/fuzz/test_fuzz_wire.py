"""What comes over a connection, cut anywhere: parsers read it or refuse it, and the cuts change nothing."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from aiohttp import web
from hostile_bytes import corpus, cut, fuzzed, hostile, places
from hypothesis import example, given

from proxy.engines.http_connection import EngineDisconnectedError, _Connection
from proxy.errors import InvalidRequest, TooLarge
from proxy.http.server import Runner
from proxy.observe.metrics import Metrics
from proxy.openai_api.request_body import MAX_DEPTH, parse_strict, serialize
from proxy.openai_api.sse import SseSplitter


def check_json(data: bytes) -> None:
    """An object that means what any parser reads in it, or a refusal."""
    try:
        body = parse_strict(data)
        sent = serialize(body)
    except (InvalidRequest, TooLarge):
        return
    assert json.loads(sent) == body == json.loads(data)
    assert data.count(b"{") < MAX_DEPTH or isinstance(body, dict)


def split(chunks: list[bytes]) -> tuple[Any, ...]:
    splitter = SseSplitter(b"data: [DONE]")
    sent = b"".join(splitter.feed(chunk) for chunk in chunks)
    return sent, splitter.end_event, splitter.receipt, splitter.failed, splitter.events


def check_events(data: bytes, where: list[int]) -> None:
    """The same is sent on, held back and counted, wherever the bytes were cut."""
    whole = split([data])
    assert split(cut(data, where)) == whole
    assert split([data[place : place + 1] for place in range(len(data))]) == whole
    sent, end, receipt, *_ = whole
    assert b"\n\ndata: [DONE]" not in b"\n\n" + sent.replace(b"\n\n\n", b"\n\n")
    if not end and not receipt:
        assert data.startswith(sent)


class _Transport:
    """As much of a transport as the connection uses; what is aborted or closed is gone."""

    def __init__(self) -> None:
        self.gone = False

    def is_closing(self) -> bool:
        return self.gone

    def abort(self) -> None:
        self.gone = True

    close = abort

    def write(self, data: bytes) -> None: ...

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _Pool:
    """Notes which connections could be used again."""

    def __init__(self) -> None:
        self.free: set[Any] = set()

    def release(self, connection: Any) -> None:
        self.free.add(connection)

    def forget(self, connection: Any) -> None:
        self.free.discard(connection)


def exchange(loop: asyncio.AbstractEventLoop, chunks: list[bytes]) -> tuple[Any, ...]:
    """Whether an answer is whole, and whether its connection may be used again; then what it is."""
    pool, transport = _Pool(), _Transport()
    connection = _Connection(pool, loop)  # type: ignore[arg-type]
    connection.connection_made(transport)  # type: ignore[arg-type]
    answer = connection.send(b"POST / HTTP/1.1\r\n\r\n", 60.0, None)
    for chunk in chunks:
        if not transport.gone:
            connection.data_received(chunk)
    again = connection in pool.free and not transport.gone
    connection.connection_lost(None)
    whole = answer._end
    assert whole != isinstance(answer._error, EngineDisconnectedError)
    # How much of an answer that broke off had come is nobody's to rely on.
    return (whole, again, answer.status, answer.headers, b"".join(answer._parts)) if whole else (whole, again)


def check_answer(loop: asyncio.AbstractEventLoop, data: bytes, where: list[int]) -> None:
    """An answer is whole or broken off; its length is the stated one; the cuts change nothing."""
    found = exchange(loop, [data])
    assert exchange(loop, cut(data, where)) == found
    if found[0]:
        _, again, status, headers, body = found
        stated = headers.get(b"content-length")
        assert status >= 200
        if stated is not None and b"transfer-encoding" not in headers and status not in (204, 304):
            assert len(body) == int(stated)
        if again:  # nothing was left that the next answer could be mistaken in
            assert exchange(loop, [data + b"HTTP/1.1 2"])[1] is False


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


class _Listener:
    """The gateway's own listener before an app that notes what reached it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.seen: list[tuple[str, str, bytes]] = []
        self.port = loop.run_until_complete(self._start())

    async def _start(self) -> int:
        async def note(request: web.Request) -> web.Response:
            try:
                self.seen.append((request.method, request.path, await request.read()))
            except web.RequestPayloadError:
                return web.Response(status=400)
            return web.Response(text="ok")

        app = web.Application()
        app.router.add_route("*", "/{rest:.*}", note)
        self.runner = Runner(app, Metrics(), structlog.get_logger(), access_log=None)
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        return int(self.runner.addresses[0][1])

    def answers(self, data: bytes) -> tuple[bytes, bytes, list[tuple[str, str, bytes]]]:
        """What has been answered to the bytes once the next client is; its answer; what reached the app."""

        async def talk() -> tuple[bytes, bytes]:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            healthy_reader, healthy_writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(data)
                await writer.drain()
                healthy_writer.write(HEALTHY)
                async with asyncio.timeout(10):
                    healthy = await healthy_reader.read()
                try:
                    async with asyncio.timeout(0.01):
                        return await reader.read(65536), healthy
                except (TimeoutError, ConnectionError):
                    return b"", healthy
            finally:
                writer.close()
                healthy_writer.close()

        self.seen = []
        return (*self.loop.run_until_complete(talk()), self.seen)


@pytest.fixture(scope="module")
def listener(loop: asyncio.AbstractEventLoop) -> Iterator[_Listener]:
    made = _Listener(loop)
    yield made
    loop.run_until_complete(made.runner.cleanup())


HEALTHY = b"POST /healthy HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\nConnection: close\r\n\r\nhi"


def check_listener(listener: _Listener, data: bytes) -> None:
    """Every answer is one of ours, and the next client is served."""
    answered, healthy, seen = listener.answers(data)
    assert not answered or answered.startswith(b"HTTP/1."), answered
    assert b"Python/" not in answered
    assert b"aiohttp" not in answered
    assert b" 500 " not in answered.split(b"\r\n", 1)[0]
    assert healthy.startswith(b"HTTP/1.1 200 OK")
    assert ("POST", "/healthy", b"hi") in seen


@pytest.mark.parametrize("data", corpus("json_body"))
def test_kept_bodies_are_read_or_refused(data: bytes) -> None:
    """Each input that once was trouble stays none."""
    check_json(data)


@fuzzed
@given(data=hostile("json_body"))
def test_body_means_one_thing_or_is_refused(data: bytes) -> None:
    """What passes is what every JSON parser reads, and what is sent to the engine."""
    check_json(data)


@pytest.mark.parametrize("data", corpus("event_stream"))
def test_kept_streams_are_split_alike_wherever_cut(data: bytes) -> None:
    """Each input that once was trouble stays none."""
    check_events(data, [1, 7, 30])


@fuzzed
@given(data=hostile("event_stream"), where=places)
@example(data=b"data: error\n\n\ndata: [DONE]\n\n", where=[])
@example(data=b"data: {}\n\n\n: interpretops-receipt {}\n\ndata: [DONE]\n\n", where=[11])
def test_stream_is_split_alike_wherever_it_is_cut(data: bytes, where: list[int]) -> None:
    """No cut hides an end marker, a receipt or an error, and no byte is lost."""
    check_events(data, where)


@pytest.mark.parametrize("data", corpus("http_answer"))
def test_kept_answers_are_whole_or_broken_off(loop: asyncio.AbstractEventLoop, data: bytes) -> None:
    """Each input that once was trouble stays none."""
    check_answer(loop, data, [3, 20, 50])


@fuzzed
@given(data=hostile("http_answer"), where=places)
@example(data=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 2", where=[])
def test_answer_is_whole_or_broken_off_wherever_it_is_cut(
    loop: asyncio.AbstractEventLoop, data: bytes, where: list[int]
) -> None:
    """Of one answer nothing is taken for the next, and a connection with leftovers is not used again."""
    check_answer(loop, data, where)


@pytest.mark.parametrize("data", corpus("http_request"))
def test_kept_requests_leave_the_listener_well(listener: _Listener, data: bytes) -> None:
    """Each input that once was trouble stays none."""
    check_listener(listener, data)


@fuzzed
@given(data=hostile("http_request"))
def test_no_request_harms_the_listener(listener: _Listener, data: bytes) -> None:
    """Anything may come; the next client is served, and no answer names what runs here."""
    check_listener(listener, data)
