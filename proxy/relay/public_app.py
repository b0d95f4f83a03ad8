"""The public app: the OpenAI routes that can be guarded, and no others."""

from __future__ import annotations

import time

from aiohttp import web

from proxy.errors import (
    NotGuarded,
    Refusal,
)
from proxy.observe.request_context import REQUEST_CONTEXT
from proxy.openai_api.openapi import openapi_document
from proxy.openai_api.prompt_text import neutralize_special_tokens
from proxy.openai_api.request_body import cache_salt, check_headers, clean, parse_strict, read_body
from proxy.openai_api.request_size import check_size, size_of
from proxy.openai_api.routes import ROUTES, UNGUARDED, Route
from proxy.policies.binding import decide
from proxy.relay.accounting import route_label
from proxy.relay.health import add_health
from proxy.relay.middleware import authenticate, refuse_foreign_pages, respond_in_openai_format
from proxy.relay.model_list import list_models, show_model
from proxy.relay.prompt_disclosure import check_prompt_disclosure, may_disclose_prompt
from proxy.relay.relay import EngineCall, relay, relay_plain
from proxy.state import GATEWAY, IDENTITY, Gateway
from proxy.tenants.limits import ConcurrencySlots, Meter


def make_public_app(gateway: Gateway) -> web.Application:
    """The app that client applications call."""
    app = web.Application(
        middlewares=[gateway.stall_guard.mark, respond_in_openai_format, refuse_foreign_pages, authenticate]
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
    """Answer a request to one of `ROUTES` under the policy that the bindings select."""
    gateway, route = request.app[GATEWAY], route_label(request)
    identity = request[IDENTITY]
    identity.check_route(route)
    if gateway.audit is not None:
        gateway.audit.require()
    meter = gateway.limiter.meter(identity.tenant)
    await meter.sync_requests()
    with meter.request() as slots:
        return await _answer(request, ROUTES[route], meter, slots)


async def _answer(
    request: web.Request, route: Route, meter: Meter, slots: ConcurrencySlots
) -> web.StreamResponse:
    gateway, context, identity = request.app[GATEWAY], request[REQUEST_CONTEXT], request[IDENTITY]
    limits = gateway.settings.gateway
    check_headers(request)
    raw = await read_body(request, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
    context.began_at = time.perf_counter()
    body = clean(route, parse_strict(raw, max_values=limits.max_body_values))
    context.stream = body.get("stream") is True
    caller = gateway.caller(route.path, request.headers, body["model"], identity)
    context.model = caller.model
    if not route.generates:
        body["model"] = gateway.engine_model(caller.model)
        context.headers.update(meter.headers())
        with gateway.fleet.lease(None) as lease:
            body = neutralize_special_tokens(route, body, lease.engine.special)
            return await relay_plain(EngineCall(gateway, lease, route, body, None, context))
    size = size_of(body, len(raw))
    check_size(size, limits)
    await slots.resize(size.requests)
    context.transcript = gateway.transcripts.begin(identity.tenant.id, route.path, body, len(raw))
    decision = decide(gateway.settings.bindings, caller, gateway.catalogue.entries)
    # No await before the pin: it must pin the revision that is active at this moment.
    with (
        gateway.catalogue.pin(decision.policy) as revision,
        gateway.fleet.lease(None if revision is None else revision.revision) as lease,
    ):
        if revision is not None:
            context.policy, context.revision = revision.policy, revision.revision
        check_prompt_disclosure(route, body, revision)
        body = neutralize_special_tokens(route, body, lease.engine.special)
        body["model"] = gateway.engine_model(caller.model)
        if gateway.access.keys_required:
            body["cache_salt"] = cache_salt(identity.tenant.id, body.get("cache_salt"))
        unknown: int | None = None
        shadow = gateway.catalogue.shadow(decision.policy)
        context.keep_answer = may_disclose_prompt(route, body, shadow) and gateway.shadows.should_run(shadow)
        await meter.sync_tokens(size)
        charge = meter.reserve(size)
        # No code between `reserve` and `try`: reserved tokens that are never settled are lost to the budget.
        try:
            context.headers.update(meter.headers())
            with gateway.metrics.in_flight.track_inprogress():
                response = await relay(
                    request, EngineCall(gateway, lease, route, body, revision, context, size)
                )
        except Refusal:
            unknown = 0
            raise
        else:
            if shadow is not None and context.keep_answer and context.reason is None:
                gateway.shadows.repeat(lease.engine, route, body, shadow, context)
            return response
        finally:
            gateway.billing.settle(charge, lease.engine, context, unknown)


async def refuse_unguarded(request: web.Request) -> web.StreamResponse:
    """Refuse a route that the engine has but on which no policy can be proven."""
    route = route_label(request)
    raise NotGuarded(f"{route} is not served here: {UNGUARDED[route]}")


async def show_document(_request: web.Request) -> web.Response:
    """The OpenAPI document."""
    return web.json_response(openapi_document())
