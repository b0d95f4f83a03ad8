"""The engine's answers are read completely or fail, however the bytes arrive."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.engines.http_connection import Answer, EngineDisconnectedError, EngineHttp, EngineUnreachableError

LONG = 30.0
WHOLE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 5\r\nX-Note: a\r\n\r\nhello"
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
)


class Script:
    """An engine that sends a script, and records what it received."""

    def __init__(self) -> None:
        self.requests = []
        self.gone = asyncio.Event()
        self.connections = 0

    async def play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                self.requests.append((head, await reader.readexactly(size)))
                await self.answer(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE)


@asynccontextmanager
async def engine(tmp_path: Path, answer: Callable[..., Any] | None = None) -> AsyncIterator[Any]:
    script = Script()
    if answer is not None:
        script.answer = answer
    server = await asyncio.start_unix_server(script.play, tmp_path / "e.sock")
    made = []
    http = EngineHttp(f"unix://{tmp_path}/e.sock", connect_timeout_s=5, made=lambda: made.append(1))
    try:
        yield script, http, made
    finally:
        http.close()
        server.close()


async def post(
    http: EngineHttp,
    body: bytes = b"{}",
    *,
    total: float = LONG,
    idle: float | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    return await http.post("/v1/x", body, headers or {}, total_timeout_s=total, idle_timeout_s=idle)


async def test_connection_is_reused(tmp_path: Path) -> None:
    """One connection serves successive requests; each gets its own complete answer."""
    async with engine(tmp_path) as (script, http, made):
        for body in (b'{"a":1}', b"{}"):
            answer = await post(http, body, headers={"X-Trace": "t"})
            assert (answer.status, answer.content_type) == (200, "application/json")
            assert answer.headers[b"x-note"] == b"a"
            assert await answer.read(2**30) == b"hello"
        assert [body for _, body in script.requests] == [b'{"a":1}', b"{}"]
        assert script.requests[0][0].startswith(b"POST /v1/x HTTP/1.1\r\nHost: engine\r\n")
        assert b"X-Trace: t\r\n" in script.requests[0][0]
        assert (script.connections, len(made)) == (1, 1)


async def test_answer_in_single_bytes_is_the_same(tmp_path: Path) -> None:
    """How the bytes are split in transit makes no difference."""

    async def drip(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n":
            writer.write(bytes([byte]))
            await writer.drain()

    async with engine(tmp_path, drip) as (script, http, _):
        for _ in range(2):
            answer = await post(http)
            assert answer.content_type == "text/event-stream"
            assert await answer.read(2**30) == b"abcde"
        assert script.connections == 1


async def test_requests_at_once_have_connections_of_their_own(tmp_path: Path) -> None:
    """A request never waits for another one's answer."""
    both = asyncio.Barrier(2)

    async def meet(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await both.wait()
        writer.write(WHOLE)

    async with engine(tmp_path, meet) as (script, http, _):
        answers = await asyncio.gather(post(http), post(http))
        assert [await answer.read(2**30) for answer in answers] == [b"hello"] * 2
        assert script.connections == 2


@pytest.mark.parametrize(
    ("sent", "before"),
    [
        (CHUNKED + b"3\r\nabc\r\n", b"abc"),
        (CHUNKED + b"3\r\nabc\r\nzz\r\n", b"abc"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", b"abc"),
    ],
)
async def test_truncated_answer_is_an_error_after_the_received_part(
    tmp_path: Path, sent: bytes, before: bytes
) -> None:
    """The received part of a broken answer is passed on, then an error; it never looks complete."""

    async def die(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.close()

    async with engine(tmp_path, die) as (_, http, _made):
        answer = await post(http)
        assert await answer.next() == before
        with pytest.raises(EngineDisconnectedError):
            await answer.next()


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"no http\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nabc",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    ],
)
async def test_answer_without_a_definite_end_is_refused(tmp_path: Path, sent: bytes) -> None:
    """Not HTTP, no length, an upgrade, endless headers: an error before anything is passed on."""

    async def speak(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(sent)
        await writer.drain()
        writer.close()

    async with engine(tmp_path, speak) as (_, http, _made):
        with pytest.raises(EngineDisconnectedError):
            await post(http)


async def test_connection_with_extra_bytes_is_not_reused(tmp_path: Path) -> None:
    """Extra bytes after an answer could be mistaken for the next one, so the connection is dropped."""

    async def twice(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(WHOLE + WHOLE)

    async with engine(tmp_path, twice) as (script, http, _):
        for _ in range(2):
            assert await (await post(http)).read(2**30) == b"hello"
        assert script.connections == 2


async def test_silence_is_noticed_and_ends_the_connection(tmp_path: Path) -> None:
    """The total timeout ends any exchange, the idle timeout only a silent one; the engine sees the
    disconnect."""

    async def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        for _ in range(4):
            await asyncio.sleep(0.2)
            writer.write(b"1\r\na\r\n")
        await reader.read()
        raise ConnectionError

    async with engine(tmp_path, begin) as (script, http, _):
        answer = await post(http, idle=0.5)
        for _ in range(4):
            assert await answer.next() == b"a"
        with pytest.raises(TimeoutError):
            await answer.next()
        await asyncio.wait_for(script.gone.wait(), 5)
        with pytest.raises(TimeoutError):
            await (await post(http, total=0.5)).read(2**30)


async def test_closing_an_answer_tells_the_engine(tmp_path: Path) -> None:
    """Closing an answer early closes its connection."""

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        await reader.read()
        raise ConnectionError

    async with engine(tmp_path, hold) as (script, http, _):
        (await post(http)).close()
        await asyncio.wait_for(script.gone.wait(), 5)


async def test_request_that_is_cancelled_tells_the_engine(tmp_path: Path) -> None:
    """Cancelling a request before its headers arrive closes its connection."""
    asked = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        raise ConnectionError

    async with engine(tmp_path, hold) as (script, http, _):
        request = asyncio.create_task(post(http))
        await asked.wait()
        request.cancel()
        await asyncio.wait_for(script.gone.wait(), 5)


async def test_reader_that_does_not_read_stops_the_engine_from_sending(tmp_path: Path) -> None:
    """At most a bounded part of an unread answer is buffered."""
    sent = 0
    size = 64 * 1024 * 1024

    async def pour(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    async with engine(tmp_path, pour) as (_, http, _made):
        answer = await post(http)
        before = -1
        while sent != before:
            before = sent
            # Both sides live in this loop: if neither has moved after so many turns, neither will.
            for _ in range(100):
                await asyncio.sleep(0)
        assert sent < 8 * 1024 * 1024
        assert len(await answer.read(2**30)) == size


async def test_closed_pool_fails_its_readers_and_serves_nobody(tmp_path: Path) -> None:
    """Closing fails every answer in progress, and no further request is sent."""

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED)
        await reader.read()

    async with engine(tmp_path, hold) as (_, http, _made):
        answer = await post(http)
        reading = asyncio.create_task(answer.read(2**30))
        await asyncio.sleep(0)
        http.close()
        with pytest.raises(EngineDisconnectedError):
            await reading
        with pytest.raises(EngineUnreachableError):
            await post(http)


async def test_unreachable_engine_is_distinguished_from_a_broken_answer(tmp_path: Path) -> None:
    """If nothing listens at the address, the request was certainly not started."""
    for address in (f"unix://{tmp_path}/none.sock", "http://127.0.0.1:1"):
        http = EngineHttp(address, connect_timeout_s=5, made=lambda: None)
        with pytest.raises(EngineUnreachableError):
            await post(http)


async def test_header_with_a_line_end_is_refused(tmp_path: Path) -> None:
    """A header value cannot start another header."""
    async with engine(tmp_path) as (script, http, _):
        with pytest.raises(ValueError, match="line end"):
            await post(http, headers={"X-Trace": "a\r\nX-Interpretops-Nonce: b"})
        assert script.requests == []
