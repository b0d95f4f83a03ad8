"""Middleware for every route: authentication, errors in OpenAI's format, and a record of each request."""

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
from proxy.observe.request_context import REQUEST_CONTEXT, RequestContext
from proxy.observe.unforeseen_error import describe_error
from proxy.openai_api.headers import PROCESSING_HEADER, REQUEST_ID_HEADER
from proxy.relay.accounting import record_request, route_label
from proxy.relay.health import HEALTH
from proxy.state import GATEWAY, IDENTITY
from proxy.tenants.access import check_page

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


@web.middleware
async def refuse_foreign_pages(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Where no keys are required, refuse web pages of other sites that are open on this machine."""
    gateway = request.app[GATEWAY]
    if not gateway.access.keys_required:
        bound = gateway.settings.gateway
        check_page(request.headers, (bound.host, *bound.allowed_hosts))
    return await handler(request)


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Where keys are required, refuse requests without a valid one, even for unknown routes."""
    if route_label(request) not in HEALTH:
        identity = request[IDENTITY] = request.app[GATEWAY].access.identify(request.headers)
        request[REQUEST_CONTEXT].tenant, request[REQUEST_CONTEXT].key = identity.tenant.id, identity.key
    return await handler(request)


@web.middleware
async def respond_in_openai_format(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give each request an id, send errors in OpenAI's format, and record how each request ended."""
    gateway = request.app[GATEWAY]
    context = request[REQUEST_CONTEXT] = RequestContext(_request_id(request))
    span = gateway.tracing.begin(request, route_label(request), context)
    began = time.perf_counter()
    status = 499
    try:
        response = await _refuse_errors(request, handler)
        status = response.status
        if not response.prepared:
            response.headers[PROCESSING_HEADER] = str(round((time.perf_counter() - began) * 1e3))
    except (asyncio.CancelledError, aiohttp.ClientConnectionResetError, ConnectionError):
        gateway.metrics.clients_gone.labels(route_label(request)).inc()
        context.reason = "client_gone"
        raise
    finally:
        record_request(request, status, time.perf_counter() - began)
        gateway.tracing.end(span, route_label(request), context, status)
    return response


async def _refuse_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    context = request[REQUEST_CONTEXT]
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
        request.app[GATEWAY].log.error("unforeseen", request_id=context.request_id, **describe_error(error))
        if request.writer.output_size > 0:
            raise ConnectionResetError("the response has started and cannot be completed") from None
        context.reason = "internal_error"
        response = web.json_response(error_body(500, "internal_error", "internal error"), status=500)
    if not response.prepared:
        response.headers.setdefault(REQUEST_ID_HEADER, context.request_id)
    return response


def _refuse(request: web.Request, refusal: Refusal) -> web.Response:
    request[REQUEST_CONTEXT].reason = refusal.code
    request.app[GATEWAY].metrics.refusals.labels(refusal.code).inc()
    body = error_body(refusal.status, refusal.code, str(refusal), refusal.param)
    if route_label(request).startswith("/v1/messages"):
        # Anthropic clients expect `type`; the rest is the same on all routes.
        body = {"type": "error", **body}
    response = web.json_response(body, status=refusal.status, headers=error_headers(refusal))
    if refusal.status in (408, 413):
        response.force_close()
    return response


def _request_id(request: web.Request) -> str:
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
