"""A minimal HTTP/1.1 client for the engine: one POST at a time on each keep-alive connection."""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from interpretops.engine_api import REFUSAL_HEADER, EngineCode
from interpretops.errors import EngineError

KEEPALIVE_S: Final = 3.0
"""Shorter than the engine's own 5 s, so that no request is sent on a connection that it is closing."""
_MAX_BUFFERED: Final = 256 * 1024
_MAX_HEADERS: Final = 64 * 1024
_NO_BODY: Final = frozenset((204, 304))


class EngineUnreachableError(OSError):
    """A connection to the engine could not be opened."""


class EngineClientClosedError(EngineUnreachableError):
    """This client was closed and opens no more connections."""


class EngineDisconnectedError(OSError):
    """The engine closed the connection before its answer was complete, or did not send valid HTTP."""


class AnswerTooLargeError(EngineError):
    """An answer that must be buffered exceeds the buffer limit."""


class Answer:
    """One answer, read as it arrives. `close` aborts it at any time; the engine then stops generating."""

    __slots__ = ("_connection", "_end", "_error", "_parts", "_size", "_waiter", "headers", "status")

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._parts: deque[bytes] = deque()
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._end = False
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        """By lower-case name; the last value of a repeated header."""

    @property
    def content_type(self) -> str:
        """The media type, without parameters."""
        return self.headers.get(b"content-type", b"").partition(b";")[0].strip().lower().decode("latin-1")

    def header(self, name: str) -> bytes:
        """A header by its lower-case name; empty when there is none."""
        return self.headers.get(name.encode(), b"")

    async def read(self, most: int) -> bytes:
        """The whole body, or what is left of it. Raises `AnswerTooLargeError` over ``most`` bytes.

        A longer body is not read to its end; `close` it.
        """
        stated = self.headers.get(b"content-length", b"")
        parts: list[bytes] = []
        size = int(stated) if stated.isdigit() else 0
        if size > most:
            raise AnswerTooLargeError(f"the answer has {size} bytes, but at most {most} are buffered")
        size = 0
        while part := await self.next():
            size += len(part)
            if size > most:
                raise AnswerTooLargeError(f"the answer exceeds the buffer limit of {most} bytes")
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def next(self) -> bytes:
        """All bytes received since the last call; waits for some. Empty at the end."""
        while not self._parts:
            if self._error is not None:
                raise self._error
            if self._end:
                return b""
            await self._wait()
        found = self._parts.popleft() if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        self._size = 0
        if not self._end:
            self._connection.resume()
        return found

    def close(self) -> None:
        """Abort the connection unless the answer is complete."""
        if not self._end:
            self._connection.abort()

    async def wait_for_headers(self) -> None:
        """Wait until status and headers have arrived."""
        while not self.status:
            if self._error is not None:
                raise self._error
            await self._wait()

    def fail(self, error: Exception) -> None:
        """End the answer with an error, unless it is complete."""
        if not self._end and self._error is None:
            self._error = error
            self.wake()

    def take(self, part: bytes) -> bool:
        """Add a part of the body. Returns whether too much is unread, so that reading should pause."""
        self._parts.append(part)
        self._size += len(part)
        return self._size > _MAX_BUFFERED

    def finish(self) -> None:
        """Mark the answer as complete."""
        self._end = True

    def wake(self) -> None:
        """Wake the waiting reader."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = self._connection.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None


def refusal_code(answer: Answer) -> EngineCode | None:
    """Why the plugin refused the request, if it did. Errors of vLLM itself have no such code."""
    code = answer.header(REFUSAL_HEADER)
    return EngineCode.of(code.decode("latin-1")) if code else None


class _Connection(asyncio.Protocol):
    """One connection and the answer being received on it. The parser calls the ``on_…`` methods."""

    def __init__(self, pool: EngineHttp, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._answer: Answer | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ends_at = 0.0
        self._idle_s: float | None = None
        self._active_at = 0.0
        self._paused = False
        self._headers_size = 0
        self.free_since = 0.0

    @property
    def usable(self) -> bool:
        """Whether a request may be sent on it."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes, total_s: float, idle_s: float | None) -> Answer:
        """Send a request and start receiving its answer."""
        assert self._transport is not None
        answer = self._answer = Answer(self)
        self._active_at = now = self.loop.time()
        self._ends_at, self._idle_s = now + total_s, idle_s
        self._headers_size = 0
        self._timer = self.loop.call_later(
            total_s if idle_s is None else min(total_s, idle_s), self._check_timeout
        )
        self._transport.write(request)
        return answer

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()
        self._lose(EngineDisconnectedError("the connection was closed"))

    def resume(self) -> None:
        """Resume reading, if it was paused because the reader was too slow."""
        if self._paused and self._transport is not None:
            self._paused, self._active_at = False, self.loop.time()
            self._transport.resume_reading()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lose(EngineDisconnectedError("the engine closed the connection"))

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None:
            # Unexpected data: it could be mistaken for the next answer.
            self.abort()
            return
        self._active_at = self.loop.time()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, ValueError):
            self.abort()
        answer.wake()

    def on_message_begin(self) -> None:
        if self._answer is None:  # it may follow the previous answer in the same data
            raise ValueError("a second answer to one request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._answer is None:
            raise ValueError("a second answer to one request")
        self._headers_size += len(name) + len(value)
        if self._headers_size > _MAX_HEADERS:
            raise ValueError("the headers are too large")
        self._answer.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._answer is None:
            raise ValueError("a second answer to one request")
        status = self._parser.get_status_code()
        headers = self._answer.headers
        if status < 200 or not (
            b"content-length" in headers or b"transfer-encoding" in headers or status in _NO_BODY
        ):
            raise ValueError("no final response, or one whose end looks the same as a broken connection")
        self._answer.status = status

    def on_body(self, body: bytes) -> None:
        if self._answer is not None and self._answer.take(body) and not self._paused:
            assert self._transport is not None
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        answer, self._answer = self._answer, None
        if answer is None:
            return
        answer.finish()
        self._stop_timer()
        self.resume()
        self.free_since = self._active_at
        if self._parser.should_keep_alive():
            self._pool.release(self)
        elif self._transport is not None:
            self._transport.close()

    def _check_timeout(self) -> None:
        """Abort if the timeout has passed; otherwise check again when it next could have."""
        now = self.loop.time()
        left_s = self._ends_at - now
        if self._idle_s is not None:
            since = now if self._paused else self._active_at
            left_s = min(left_s, since + self._idle_s - now)
        if left_s > 0:
            self._timer = self.loop.call_later(left_s, self._check_timeout)
            return
        self._timer = None
        self._lose(TimeoutError("the engine timed out"))
        self.abort()

    def _lose(self, error: Exception) -> None:
        self._stop_timer()
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.fail(error)
        self._pool.forget(self)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class EngineHttp:
    """Connections to one engine over a unix socket or TCP, as many as there are requests."""

    def __init__(self, address: str, *, connect_timeout_s: float, made: Callable[[], None]) -> None:
        self._address = address
        self._url = urlsplit(address)
        self._connect_timeout_s = connect_timeout_s
        self._made = made
        self._free: list[_Connection] = []
        self._open: set[_Connection] = set()
        self._closed = False
        host = "engine" if self._url.scheme == "unix" else self._url.netloc
        self._host = f"Host: {host}\r\nContent-Type: application/json\r\n"

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        *,
        total_timeout_s: float,
        idle_timeout_s: float | None,
    ) -> Answer:
        """Send JSON; returns when the answer's headers have arrived.

        idle_timeout_s  longest wait for more data, headers included; None: only the total timeout applies
        Raises `EngineUnreachableError`, `EngineDisconnectedError` or `TimeoutError`; so does reading from it.
        """
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        if lines.count("\r") + lines.count("\n") != 2 * len(headers):
            raise ValueError("a header holds a line end")
        head = f"POST {path} HTTP/1.1\r\n{self._host}Content-Length: {len(body)}\r\n{lines}\r\n"
        connection = self._take() or await self._connect()
        answer = connection.send(head.encode("latin-1") + body, total_timeout_s, idle_timeout_s)
        try:
            await answer.wait_for_headers()
        except BaseException:
            answer.close()
            raise
        return answer

    def release(self, connection: _Connection) -> None:
        """Keep a connection with a completed answer for the next request."""
        if not self._closed:
            self._free.append(connection)

    def forget(self, connection: _Connection) -> None:
        """Forget a lost connection."""
        self._open.discard(connection)
        if connection in self._free:
            self._free.remove(connection)

    def close(self) -> None:
        """Abort all connections; pending reads raise."""
        self._closed = True
        for connection in list(self._open):
            connection.abort()

    def _take(self) -> _Connection | None:
        while self._free:
            connection = self._free.pop()
            if connection.usable and connection.loop.time() - connection.free_since < KEEPALIVE_S:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> _Connection:
        self._check_open()
        loop = asyncio.get_running_loop()
        connection = _Connection(self, loop)
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                if self._url.scheme == "unix":
                    path = self._address.removeprefix("unix://")
                    await loop.create_unix_connection(lambda: connection, path)
                else:
                    secure = self._url.scheme == "https"
                    port = self._url.port or (443 if secure else 80)
                    tls = ssl.create_default_context() if secure else None
                    host = self._url.hostname or ""
                    await loop.create_connection(lambda: connection, host, port, ssl=tls)
        except (OSError, TimeoutError) as error:
            raise EngineUnreachableError(str(error) or "connection timed out") from error
        self._open.add(connection)
        self._made()
        try:
            self._check_open()
        except EngineUnreachableError:
            connection.abort()
            raise
        return connection

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClientClosedError("the engine client was closed")
