"""Around every route: who is calling, OpenAI's shape for every error, and an account of every end."""

from __future__ import annotations

import asyncio
import re
import secrets
import time

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.errors import (
    InvalidRequest,
    MethodNotAllowed,
    Refusal,
    UnknownRoute,
    error_body,
    error_headers,
)
from proxy.observe.request_context import TRAIL, Trail
from proxy.observe.unforeseen_error import told
from proxy.openai_api.headers import PROCESSING_HEADER, REQUEST_ID_HEADER
from proxy.relay.accounting import account, route_label
from proxy.relay.health import HEALTH
from proxy.state import GATEWAY, IDENTITY
from proxy.tenants.access import check_page

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@web.middleware
async def refuse_foreign_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Without keys, a web page open on this machine must not reach any route by a name of its own."""
    gateway = request.app[GATEWAY]
    if not gateway.access.wanted:
        bound = gateway.settings.gateway
        check_page(request.headers, (bound.host, *bound.allowed_hosts))
    return await handler(request)


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let nobody near a route, served or not, who shows no key where keys are asked for."""
    if route_label(request) not in HEALTH:
        identity = request[IDENTITY] = request.app[GATEWAY].access.identify(request.headers)
        request[TRAIL].tenant, request[TRAIL].key = identity.tenant.id, identity.key
    return await handler(request)


@web.middleware
async def answer_in_openai_shape(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, every error OpenAI's shape, and every end a line in the log."""
    gateway = request.app[GATEWAY]
    trail = request[TRAIL] = Trail(_request_id(request))
    span = gateway.tracing.begin(request, route_label(request), trail)
    began = time.perf_counter()
    status = 499
    try:
        response = await _refuse_errors(request, handler)
        status = response.status
        if not response.prepared:
            response.headers[PROCESSING_HEADER] = str(round((time.perf_counter() - began) * 1e3))
    except (asyncio.CancelledError, aiohttp.ClientConnectionResetError, ConnectionError):
        gateway.metrics.clients_gone.labels(route_label(request)).inc()
        trail.reason = "client_gone"
        raise
    finally:
        account(request, status, time.perf_counter() - began)
        gateway.tracing.end(span, route_label(request), trail, status)
    return response


async def _refuse_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    trail = request[TRAIL]
    try:
        response = await handler(request)
    except Refusal as refusal:
        response = _refuse(request, refusal)
    except web.HTTPNotFound:
        response = _refuse(request, UnknownRoute(f"{request.path[:128]!r} is not served here"))
    except web.HTTPMethodNotAllowed as error:
        wrong = MethodNotAllowed(
            f"{request.method} is not allowed here; use {', '.join(sorted(error.allowed_methods))}"
        )
        response = _refuse(request, wrong)
    except web.HTTPException as error:
        response = _refuse(request, InvalidRequest(error.reason))
    except (aiohttp.ClientConnectionResetError, ConnectionError):
        raise
    except Exception as error:
        request.app[GATEWAY].log.error("unforeseen", request_id=trail.request_id, **told(error))
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer had begun and cannot be finished") from None
        trail.reason = "internal_error"
        response = web.json_response(error_body(500, "internal_error", "internal error"), status=500)
    if not response.prepared:
        response.headers.setdefault(REQUEST_ID_HEADER, trail.request_id)
    return response


def _refuse(request: web.Request, refusal: Refusal) -> web.Response:
    request[TRAIL].reason = refusal.code
    request.app[GATEWAY].metrics.refusals.labels(refusal.code).inc()
    body = error_body(refusal.status, refusal.code, str(refusal), refusal.param)
    if route_label(request).startswith("/v1/messages"):
        # Anthropic's clients look for it; the rest is as everywhere.
        body = {"type": "error", **body}
    response = web.json_response(body, status=refusal.status, headers=error_headers(refusal))
    if refusal.status in (408, 413):
        response.force_close()
    return response


def _request_id(request: web.Request) -> str:
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
