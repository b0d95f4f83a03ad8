"""Network input, split anywhere: parsers accept or refuse it, and the splits change nothing."""

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
    """The body is an object that every parser reads alike, or is refused."""
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
    """The same bytes are passed on, held back and counted, wherever they were split."""
    whole = split([data])
    assert split(cut(data, where)) == whole
    assert split([data[place : place + 1] for place in range(len(data))]) == whole
    sent, end, receipt, *_ = whole
    assert b"\n\ndata: [DONE]" not in b"\n\n" + sent.replace(b"\n\n\n", b"\n\n")
    if not end and not receipt:
        assert data.startswith(sent)


class _Transport:
    """The part of a transport that the connection uses."""

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
    """Records which connections could be reused."""

    def __init__(self) -> None:
        self.free: set[Any] = set()

    def release(self, connection: Any) -> None:
        self.free.add(connection)

    def forget(self, connection: Any) -> None:
        self.free.discard(connection)


def exchange(loop: asyncio.AbstractEventLoop, chunks: list[bytes]) -> tuple[Any, ...]:
    """Whether an answer is complete and its connection reusable, and if complete, its content."""
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
    # The received part of a truncated answer is unspecified.
    return (whole, again, answer.status, answer.headers, b"".join(answer._parts)) if whole else (whole, again)


def check_answer(loop: asyncio.AbstractEventLoop, data: bytes, where: list[int]) -> None:
    """An answer is complete or truncated; its length is the stated one; splits change nothing."""
    found = exchange(loop, [data])
    assert exchange(loop, cut(data, where)) == found
    if found[0]:
        _, again, status, headers, body = found
        stated = headers.get(b"content-length")
        assert status >= 200
        if stated is not None and b"transfer-encoding" not in headers and status not in (204, 304):
            assert len(body) == int(stated)
        if again:  # nothing is left over that could be mistaken for the next answer
            assert exchange(loop, [data + b"HTTP/1.1 2"])[1] is False


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    made = asyncio.new_event_loop()
    yield made
    made.close()


class _Listener:
    """The gateway's listener with an app that records what reached it."""

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
        """The responses to the bytes once the next client is answered, its response, and what reached the
        app."""

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
    """Every response is ours, and the next client is served."""
    answered, healthy, seen = listener.answers(data)
    assert not answered or answered.startswith(b"HTTP/1."), answered
    assert b"Python/" not in answered
    assert b"aiohttp" not in answered
    assert b" 500 " not in answered.split(b"\r\n", 1)[0]
    assert healthy.startswith(b"HTTP/1.1 200 OK")
    assert ("POST", "/healthy", b"hi") in seen


@pytest.mark.parametrize("data", corpus("json_body"))
def test_corpus_bodies_are_accepted_or_refused(data: bytes) -> None:
    """Every input that once caused a failure is handled."""
    check_json(data)


@fuzzed
@given(data=hostile("json_body"))
def test_body_is_unambiguous_or_refused(data: bytes) -> None:
    """An accepted body is what every JSON parser reads, and what is sent to the engine."""
    check_json(data)


@pytest.mark.parametrize("data", corpus("event_stream"))
def test_corpus_streams_parse_alike_wherever_split(data: bytes) -> None:
    """Every input that once caused a failure is handled."""
    check_events(data, [1, 7, 30])


@fuzzed
@given(data=hostile("event_stream"), where=places)
@example(data=b"data: error\n\n\ndata: [DONE]\n\n", where=[])
@example(data=b"data: {}\n\n\n: interpretops-receipt {}\n\ndata: [DONE]\n\n", where=[11])
def test_stream_parses_alike_wherever_it_is_split(data: bytes, where: list[int]) -> None:
    """No split hides an end marker, a receipt or an error, and no byte is lost."""
    check_events(data, where)


@pytest.mark.parametrize("data", corpus("http_answer"))
def test_corpus_answers_are_complete_or_truncated(loop: asyncio.AbstractEventLoop, data: bytes) -> None:
    """Every input that once caused a failure is handled."""
    check_answer(loop, data, [3, 20, 50])


@fuzzed
@given(data=hostile("http_answer"), where=places)
@example(data=b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 2", where=[])
def test_answer_is_complete_or_truncated_wherever_it_is_split(
    loop: asyncio.AbstractEventLoop, data: bytes, where: list[int]
) -> None:
    """No part of one answer is taken for the next, and a connection with leftover bytes is not reused."""
    check_answer(loop, data, where)


@pytest.mark.parametrize("data", corpus("http_request"))
def test_corpus_requests_do_not_harm_the_listener(listener: _Listener, data: bytes) -> None:
    """Every input that once caused a failure is handled."""
    check_listener(listener, data)


@fuzzed
@given(data=hostile("http_request"))
def test_no_request_harms_the_listener(listener: _Listener, data: bytes) -> None:
    """Whatever arrives, the next client is served, and no response reveals software versions."""
    check_listener(listener, data)
