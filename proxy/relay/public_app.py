"""The public app: OpenAI's routes that can be guarded, and nothing else."""

from __future__ import annotations

import time

from aiohttp import web

from proxy.errors import (
    NotGuarded,
    Refusal,
)
from proxy.observe.request_context import TRAIL
from proxy.openai_api.openapi import openapi_document
from proxy.openai_api.prompt_text import make_inert
from proxy.openai_api.request_body import cache_salt, check_headers, clean, parse_strict, read_body
from proxy.openai_api.request_size import check_size, size_of
from proxy.openai_api.routes import ROUTES, UNGUARDED, Route
from proxy.policies.binding import decide
from proxy.relay.accounting import route_label
from proxy.relay.health import add_health
from proxy.relay.middleware import answer_in_openai_shape, authenticate, refuse_foreign_pages
from proxy.relay.model_list import list_models, show_model
from proxy.relay.prompt_disclosure import check_reading, may_read
from proxy.relay.relay import Demand, relay, relay_plain
from proxy.state import GATEWAY, IDENTITY, Gateway
from proxy.tenants.limits import Meter, Places


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


async def show_document(_request: web.Request) -> web.Response:
    """What can be asked here, for programs that read it."""
    return web.json_response(openapi_document())
