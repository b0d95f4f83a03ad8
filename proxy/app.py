"""The public app: OpenAI's routes that can be guarded, and nothing else."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from typing import Any, Final

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from proxy.access import check_page
from proxy.binding import Caller, choices, decide
from proxy.limits import Meter, Places
from proxy.openapi import openapi_document
from proxy.prompt_reading import check_reading, may_read
from proxy.prompt_text import make_inert
from proxy.refusal import (
    InvalidRequest,
    MethodNotAllowed,
    NotGuarded,
    Refusal,
    UnknownModel,
    UnknownRoute,
    error_body,
    error_headers,
)
from proxy.relay import PROCESSING_HEADER, REQUEST_ID_HEADER, Demand, relay, relay_plain
from proxy.request_size import check_size, size_of
from proxy.routes import ROUTES, UNGUARDED, Route
from proxy.sanitize import cache_salt, check_headers, clean, parse_strict, read_body
from proxy.state import GATEWAY, IDENTITY, Gateway
from proxy.trail import TRAIL, Trail
from proxy.unforeseen import told

HEALTH: Final = frozenset(("/healthz", "/readyz"))
"""Routes that an orchestrator asks without a key; they say yes or no, and of a no its codes."""
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def make_public_app(gateway: Gateway) -> web.Application:
    """The app that applications talk to."""
    app = web.Application(
        middlewares=[gateway.stalls.mark, answer_in_openai_shape, refuse_foreign_pages, authenticate]
    )
    app[GATEWAY] = gateway
    for route in ROUTES:
        app.router.add_post(route, generate)
    for route in UNGUARDED:
        app.router.add_route("*", route, refuse_unguarded)
    app.router.add_get("/v1/models", list_models, allow_head=False)
    app.router.add_get("/v1/models/{model:.+}", show_model, allow_head=False)
    app.router.add_get("/openapi.json", show_document, allow_head=False)
    add_health(app)
    return app


def add_health(app: web.Application) -> None:
    """The routes by which an orchestrator watches the gateway."""
    app.router.add_get("/healthz", healthz, allow_head=False)
    app.router.add_get("/readyz", readyz, allow_head=False)


async def healthz(_request: web.Request) -> web.Response:
    """The gateway's process answers."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Whether requests can be served, and the codes of what is in the way."""
    reasons = sorted({reason.code for reason in request.app[GATEWAY].readiness.reasons()})
    return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)


async def generate(request: web.Request) -> web.StreamResponse:
    """Answer on one of `ROUTES`, streamed or not, under the policy that the bindings decide."""
    gateway, route = request.app[GATEWAY], route_label(request)
    identity = request[IDENTITY]
    identity.check_route(route)
    if gateway.audit is not None:
        gateway.audit.require()
    meter = gateway.limiter.meter(identity.tenant)
    await meter.hear_requests()
    with meter.request() as places:
        return await _answer(request, ROUTES[route], meter, places)


async def _answer(request: web.Request, route: Route, meter: Meter, places: Places) -> web.StreamResponse:
    gateway, trail, identity = request.app[GATEWAY], request[TRAIL], request[IDENTITY]
    limits = gateway.settings.gateway
    check_headers(request)
    raw = await read_body(request, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
    trail.began_at = time.perf_counter()
    body = clean(route, parse_strict(raw, max_values=limits.max_body_values))
    trail.stream = body.get("stream") is True
    caller = gateway.caller(route.path, request.headers, body["model"], identity)
    trail.model = caller.model
    if not route.generates:
        body["model"] = gateway.engine_model(caller.model)
        trail.headers.update(meter.headers())
        with gateway.fleet.turn(None) as turn:
            body = make_inert(route, body, turn.engine.special)
            return await relay_plain(Demand(gateway, turn, route, body, None, trail))
    size = size_of(body, len(raw))
    check_size(size, limits)
    await places.widen(size.requests)
    trail.transcript = gateway.transcripts.begin(identity.tenant.id, route.path, body, len(raw))
    decision = decide(gateway.settings.bindings, caller, gateway.catalogue.entries)
    # No await between here and the pin: the revision is the one that is active now, and it stays resident.
    with (
        gateway.catalogue.pin(decision.policy) as revision,
        gateway.fleet.turn(None if revision is None else revision.revision) as turn,
    ):
        if revision is not None:
            trail.policy, trail.revision = revision.policy, revision.revision
        check_reading(route, body, revision)
        body = make_inert(route, body, turn.engine.special)
        body["model"] = gateway.engine_model(caller.model)
        if gateway.access.wanted:
            body["cache_salt"] = cache_salt(identity.tenant.id, body.get("cache_salt"))
        unknown: int | None = None
        shadow = gateway.catalogue.shadow(decision.policy)
        trail.keep_answer = may_read(route, body, shadow) and gateway.shadows.wanted(shadow)
        await meter.hear_tokens(size)
        charge = meter.reserve(size)
        # Nothing stands between: what is set aside and not settled would be gone from the budget.
        try:
            trail.headers.update(meter.headers())
            with gateway.metrics.in_flight.track_inprogress():
                response = await relay(request, Demand(gateway, turn, route, body, revision, trail, size))
        except Refusal:
            unknown = 0
            raise
        else:
            if shadow is not None and trail.keep_answer and trail.reason is None:
                gateway.shadows.repeat(turn.engine, route, body, shadow, trail)
            return response
        finally:
            gateway.settlements.settle(charge, turn.engine, trail, unknown)


async def refuse_unguarded(request: web.Request) -> web.StreamResponse:
    """A route that the engine has and no policy can be proven on."""
    route = route_label(request)
    raise NotGuarded(f"{route} is not served here: {UNGUARDED[route]}")


async def list_models(request: web.Request) -> web.Response:
    """The engine's model, and an alias for every policy that this caller may choose."""
    return web.json_response({"object": "list", "data": _models(request)})


async def show_model(request: web.Request) -> web.Response:
    """One entry of the model list."""
    name = request.match_info["model"]
    for model in _models(request):
        if model["id"] == name:
            return web.json_response(model)
    raise UnknownModel(
        f"model {name[:128]!r} is not served here; GET /v1/models lists what is", param="model"
    )


async def show_document(_request: web.Request) -> web.Response:
    """What can be asked here, for programs that read it."""
    return web.json_response(openapi_document())


def _models(request: web.Request) -> list[dict[str, Any]]:
    gateway, identity = request.app[GATEWAY], request[IDENTITY]
    by_name = {model["id"]: model for model in gateway.fleet.require().models}
    names = [*by_name, *(alias.name for alias in gateway.settings.aliases if alias.name not in by_name)]
    listed: list[dict[str, Any]] = []
    for name in filter(identity.may_name, names):
        try:
            model = by_name[gateway.engine_model(name)]
        except UnknownModel:
            # An alias of a model that the engine does not serve: logged when the engine joined.
            continue
        base = {
            "object": "model",
            "created": model.get("created", 0),
            "owned_by": "interpretops",
            "max_model_len": model.get("max_model_len"),
        }
        listed.append({"id": name, **base})
        caller = Caller("/v1/chat/completions", name, None, identity.tenant.id, identity.key)
        for policy in choices(gateway.settings.bindings, caller, gateway.catalogue.entries):
            listed.append({"id": f"{name}+{policy}", **base, "parent": name})
    return listed


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
        _account(request, status, time.perf_counter() - began)
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


def _account(request: web.Request, status: int, total_s: float) -> None:
    gateway, trail, route = request.app[GATEWAY], request[TRAIL], route_label(request)
    if route in HEALTH or route == "/metrics":
        return
    metrics = gateway.metrics
    metrics.requests.labels(route, trail.tenant, trail.policy, str(status)).inc()
    metrics.outcomes.labels(_outcome(status, trail)).inc()
    if trail.reason is None and trail.engine_s:
        metrics.e2e.labels(trail.policy).observe(total_s)
        metrics.overhead.observe(max(0.0, total_s - trail.engine_s))
    if trail.ttft_s is not None:
        metrics.ttft.labels(trail.policy).observe(trail.ttft_s)
    if trail.evaluated:
        metrics.tokens_evaluated.labels(trail.policy).inc(trail.evaluated)
        metrics.edits_applied.labels(trail.policy).inc(trail.edits)
        metrics.gates_fired.labels(trail.policy).inc(trail.gates)
        metrics.requests_gated.labels(trail.policy).inc(trail.gates > 0)
        gateway.drift.note(trail)
    if trail.transcript is not None:
        gateway.transcripts.keep(trail, status)
    if gateway.audit is not None and trail.tenant != "none":
        gateway.audit.append(
            "request",
            request_id=trail.request_id,
            tenant=trail.tenant,
            key=trail.key,
            route=route,
            policy=trail.policy,
            revision=trail.revision,
            status=status,
            reason=trail.reason,
            stream=trail.stream,
            tokens=trail.tokens,
            edits=trail.edits,
            gates=trail.gates,
        )
    gateway.log.info(
        "request",
        request_id=trail.request_id,
        route=route,
        status=status,
        tenant=trail.tenant,
        key=trail.key,
        policy=trail.policy,
        revision=trail.revision[:12],
        stream=trail.stream,
        reason=trail.reason,
        duration_ms=round(total_s * 1e3, 3),
        ttft_ms=None if trail.ttft_s is None else round(trail.ttft_s * 1e3, 3),
    )


def _outcome(status: int, trail: Trail) -> str:
    """One of `OUTCOMES`. A stream has its status before it can break off."""
    if trail.reason == "client_gone":
        return "client_gone"
    if status >= 500 or (status == 200 and trail.reason is not None):
        return "failed"
    return "answered" if status < 400 else "refused"


def route_label(request: web.Request) -> str:
    """A label of few values: the route's pattern, never the path as written."""
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical


def _request_id(request: web.Request) -> str:
    given = request.headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
