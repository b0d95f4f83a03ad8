"""aiohttp's server, with OpenAI-format errors for requests that are not valid HTTP.

aiohttp answers these in plain text and logs the exception, which quotes the malformed line or header:
possibly an API key. Here neither the response nor the log quotes any part of the request.
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

_ERRORS: Final = {
    400: ("invalid_http", "the request is not valid HTTP/1.1"),
    408: ("request_timeout", "the request did not arrive in time"),
    413: ("request_too_large", "the request is too large"),
    417: ("expectation_failed", "the Expect header is not supported"),
    431: ("headers_too_large", "the request's headers are too large"),
}
_NAME: Final = "interpretops"
"""The `Server` header. aiohttp's default names its version and Python's, which helps attackers."""
_NO_VERSION: Final = web.RequestKey("no_version", bool)


class Runner(web.AppRunner):
    """Runs an app; counts malformed requests and answers them in OpenAI's format."""

    def __init__(
        self, app: web.Application, metrics: Metrics, log: FilteringBoundLogger, **options: Any
    ) -> None:
        super().__init__(app, **options)
        self._reporting = metrics, log
        app.on_response_prepare.append(_name_server)

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        make, handle = made.request_factory, made.request_handler

        def request_factory(message: RawRequestMessage, *rest: Any) -> web.BaseRequest:
            if message.version >= HttpVersion10:
                return make(message, *rest)
            # aiohttp parses a request line without a version as HTTP/0.9, and would answer in that.
            request = make(message._replace(version=HttpVersion11, should_close=True), *rest)
            request[_NO_VERSION] = True
            return request

        async def request_handler(request: web.BaseRequest) -> web.StreamResponse:
            if _NO_VERSION in request:
                return request.protocol.handle_error(request, 400)
            return await handle(request)

        return _Server(
            self._reporting,
            request_handler,
            request_factory=request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )


class Site(web.SockSite):
    """A listener with timeouts for the TLS handshake and shutdown."""

    def __init__(
        self,
        runner: web.BaseRunner,
        sock: socket.socket,
        tls: ssl.SSLContext | None,
        handshake_timeout_s: float,
    ) -> None:
        super().__init__(runner, sock, ssl_context=tls)
        # The stall guard does not see connections before their TLS handshake.
        self._timeout_s = None if tls is None else handshake_timeout_s

    async def start(self) -> None:
        """Start listening."""
        # Copies `BaseSite.start` and `SockSite.start`, which do not accept these timeouts.
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
    def __init__(self, reporting: tuple[Metrics, FilteringBoundLogger], *rest: Any, **options: Any) -> None:
        super().__init__(*rest, **options)
        self.reporting = reporting

    def __call__(self) -> RequestHandler:
        return _Handler(self, loop=self._loop, **self._kwargs)


class _Handler(RequestHandler):
    """One connection."""

    __slots__ = ("_reporting",)

    def __init__(self, server: _Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._reporting = server.reporting

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """An error in OpenAI's format for a request that reached no app. Closes the connection."""
        metrics, log = self._reporting
        code, text = _ERRORS.get(status, ("internal_error", "internal error"))
        request_id = f"req_{secrets.token_hex(12)}"
        metrics.refusals.labels(code).inc()
        log.warning("bad_connection", request_id=request_id, status=status, kind=type(exc).__name__)
        if request.writer.output_size > 0:
            raise ConnectionError("the response has started and cannot be completed")
        headers = {"X-Request-Id": request_id, "x-should-retry": "false", hdrs.SERVER: _NAME}
        response = web.json_response(error_body(status, code, text), status=status, headers=headers)
        response.force_close()
        return response


async def _name_server(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers[hdrs.SERVER] = _NAME
