"""aiohttp's server with errors of our own below the app: requests that are no HTTP, in OpenAI's shape.

aiohttp answers them in plain text and logs the exception, which quotes the header or line that was wrong:
a key, when that is where the mistake is. Here neither the answer nor the log quotes anything.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
from typing import Any, Final

from aiohttp import HttpVersion10, HttpVersion11, hdrs, web
from aiohttp.http_parser import RawRequestMessage
from aiohttp.web_protocol import RequestHandler
from structlog.typing import FilteringBoundLogger

from proxy.errors import error_body
from proxy.observe.metrics import Metrics

_TOLD: Final = {
    400: ("invalid_http", "the request is not valid HTTP/1.1"),
    408: ("request_timeout", "the request did not arrive in time"),
    413: ("request_too_large", "the request is too large"),
    417: ("expectation_failed", "the demanded expectation is not supported"),
    431: ("headers_too_large", "the request's headers are too large"),
}
_NAME: Final = "interpretops"
"""All that `Server` says: aiohttp would name its version and Python's, by which known holes are looked up."""
_NO_VERSION: Final = web.RequestKey("no_version", bool)


class Runner(web.AppRunner):
    """Runs an app whose broken connections are counted and answered as everything else is."""

    def __init__(
        self, app: web.Application, metrics: Metrics, log: FilteringBoundLogger, **options: Any
    ) -> None:
        super().__init__(app, **options)
        self._told = metrics, log
        app.on_response_prepare.append(_name_server)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        make, handle = made.request_factory, made.request_handler

        def request_factory(message: RawRequestMessage, *rest: Any) -> web.BaseRequest:
            if message.version >= HttpVersion10:
                return make(message, *rest)
            # Of a line without a version aiohttp makes HTTP/0.9, and would answer in it.
            request = make(message._replace(version=HttpVersion11, should_close=True), *rest)
            request[_NO_VERSION] = True
            return request

        async def request_handler(request: web.BaseRequest) -> web.StreamResponse:
            if _NO_VERSION in request:
                return request.protocol.handle_error(request, 400)
            return await handle(request)

        return _Server(
            self._told,
            request_handler,
            request_factory=request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )


class Site(web.SockSite):
    """A listener whose clients must begin, and end, TLS in time."""

    def __init__(
        self,
        runner: web.BaseRunner,
        sock: socket.socket,
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
    ) -> None:
        super().__init__(runner, sock, ssl_context=tls)
        # A connection before its handshake is none that the watch for stalls can see.
        self._timeout_s = None if tls is None else handshake_timeout_s

    async def start(self) -> None:
        """Listen."""
        # As `BaseSite.start` and `SockSite.start`, which know nothing of timeouts.
        self._runner._reg_site(self)
        server = self._runner.server
        assert server is not None
        self._server = await asyncio.get_running_loop().create_server(
            server,
            sock=self._sock,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=self._timeout_s,
            ssl_shutdown_timeout=self._timeout_s,
        )


class _Server(web.Server):
    def __init__(self, told: tuple[Metrics, FilteringBoundLogger], *rest: Any, **options: Any) -> None:
        super().__init__(*rest, **options)
        self.told = told

    def __call__(self) -> RequestHandler:
        return _Handler(self, loop=self._loop, **self._kwargs)


class _Handler(RequestHandler):
    """One connection."""

    __slots__ = ("_told",)

    def __init__(self, server: _Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._told = server.told

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """An error of OpenAI's shape for what no app has seen; the connection is closed after it."""
        metrics, log = self._told
        code, text = _TOLD.get(status, ("internal_error", "internal error"))
        request_id = f"req_{secrets.token_hex(12)}"
        metrics.refusals.labels(code).inc()
        log.warning("bad_connection", request_id=request_id, status=status, kind=type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer had begun and cannot be finished")
        headers = {"X-Request-Id": request_id, "x-should-retry": "false", hdrs.SERVER: _NAME}
        response = web.json_response(error_body(status, code, text), status=status, headers=headers)
        response.force_close()
        return response


async def _name_server(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers[hdrs.SERVER] = _NAME
