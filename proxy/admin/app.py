"""The admin app on its own listener: policies, reload, promotion, dry runs and metrics."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from multidict import CIMultiDict, CIMultiDictProxy

from interpretops.errors import InterpretOpsError, PolicyError
from interpretops.settings import Tenant
from interpretops.settings.access import ANONYMOUS
from proxy.admin.reload import reload_everything
from proxy.errors import EngineNotReady, FieldNotAllowed, InvalidRequest, Refusal
from proxy.observe.metrics import CONTENT_TYPE_LATEST
from proxy.openai_api.headers import POLICY_HEADER
from proxy.openai_api.request_body import parse_strict, read_body
from proxy.openai_api.routes import ROUTES
from proxy.policies.binding import NONE, decide, explain
from proxy.policies.entry import Entry
from proxy.policies.policy_files import Revision
from proxy.relay.accounting import route_label
from proxy.relay.health import HEALTH, add_health
from proxy.relay.middleware import answer_in_openai_shape
from proxy.state import GATEWAY, Gateway
from proxy.tenants.access import Identity, names_this_machine

ADMIN: web.RequestKey[str] = web.RequestKey("admin", str)
"""Name of the authenticated admin, for the audit log."""
_MAX_BODY_BYTES = 64 * 1024
_MAX_REASON = 1000
_REVISION = re.compile(r"[0-9a-f]{12,64}")


class AdminRefused(Refusal):
    """The action cannot be done now; the message says why."""

    code = "admin_refused"
    status = 409


def make_admin_app(gateway: Gateway) -> web.Application:
    """The app that operators and Prometheus call."""
    app = web.Application(
        middlewares=[gateway.stall_guard.mark, answer_in_openai_shape, refuse_browsers, authorize]
    )
    app[GATEWAY] = gateway
    app.router.add_get("/admin/policies", list_policies, allow_head=False)
    app.router.add_get("/admin/engines", list_engines, allow_head=False)
    app.router.add_post("/admin/reload", reload)
    app.router.add_post("/admin/policies/{id}/{change:promote|rollback}", change_policy)
    app.router.add_post("/admin/policies/{id}/baseline", pin_baseline)
    app.router.add_post("/admin/resolve", resolve)
    app.router.add_get("/admin/audit", audit_head, allow_head=False)
    app.router.add_get("/metrics", show_metrics, allow_head=False)
    add_health(app)
    return app


@web.middleware
async def refuse_browsers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse requests from web pages, so that no site open in the operator's browser can use these routes."""
    if "Origin" in request.headers:
        raise FieldNotAllowed("the admin routes refuse web pages; call them without an Origin header")
    gateway = request.app[GATEWAY]
    host = request.headers.get("Host")
    own = (gateway.settings.gateway.admin_host,)
    if not gateway.access.keys_required and not names_this_machine(host, own):
        raise FieldNotAllowed("without keys the admin routes only accept names of this machine as Host")
    return await handler(request)


@web.middleware
async def authorize(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Where keys are required: reading needs a viewer's key, changing needs an operator's."""
    route = route_label(request)
    if route not in HEALTH:
        reads = request.method == "GET" or route == "/admin/resolve"
        request[ADMIN] = request.app[GATEWAY].access.authorize(
            request.headers, "viewer" if reads else "operator"
        )
    return await handler(request)


async def list_policies(request: web.Request) -> web.Response:
    """Every policy, its revisions, and the error of its newest file."""
    gateway = request.app[GATEWAY]
    entries = gateway.catalogue.entries
    listed = [_entry(gateway, entries[policy]) for policy in sorted(entries)]
    named = {str(entry["error"]) for entry in listed}
    strays = {str(path): error for path, error in gateway.intake.file_errors.items() if error not in named}
    return web.json_response(
        {
            "policies": listed,
            "file_errors": strays,
            "bindings": [binding.model_dump(mode="json") for binding in gateway.settings.bindings],
            "not_ready": "; ".join(reason.detail for reason in gateway.readiness.reasons()) or None,
        }
    )


async def list_engines(request: web.Request) -> web.Response:
    """Every engine: whether it takes requests, if not why, and its attested revisions."""
    links = request.app[GATEWAY].fleet.links
    return web.json_response({"engines": [links[name].summary() for name in sorted(links)]})


async def reload(request: web.Request) -> web.Response:
    """Reload, as SIGHUP does. Responds once all newly accepted requests use what was loaded."""
    gateway = request.app[GATEWAY]
    try:
        report = await reload_everything(gateway)
    except InterpretOpsError as error:
        raise EngineNotReady(str(error)) from error
    return web.json_response(report.summary())


async def change_policy(request: web.Request) -> web.Response:
    """Promote a candidate, or roll back to the previous revision. Recorded before it is done.

    Body of a promotion: ``revision``, the one reviewed, as 12 or more of its hex digits; optional
    ``"to": "shadow"`` to run it in shadow of the active one, and ``"override": {"by": …, "why": …}`` to
    promote without a Risk Card that meets the policy's criteria. A rollback may name the target ``revision``.
    Files can change during a review, so nothing is done if another revision has taken the named one's place.
    """
    gateway = request.app[GATEWAY]
    policy, catalogue, change = request.match_info["id"], gateway.catalogue, request.match_info["change"]
    override, to, named = await _read_change(request, change)
    fields: dict[str, Any] = {"policy": policy, "by": request[ADMIN], "to": to, "asked": named}
    if override is not None:
        if gateway.audit is None:
            raise AdminRefused("an override must be recorded, but there is no audit log; set audit.path")
        fields["override"] = override
    try:
        found = catalogue.entries.get(policy)
        before = None if found is None else found.previous
        target = catalogue.candidate(policy) if change == "promote" else before
        fields["from"] = _name(None if found is None else found.active)
        fields["revision"] = revision = _name(target)
        _check_named(named, target, change)
        if gateway.audit is not None:
            await gateway.audit.append_durably(change, **fields)
        if to == "shadow":
            await catalogue.cast_shadow(policy, revision)
        elif change == "promote":
            await catalogue.promote(policy, revision, override=override is not None)
        else:
            await catalogue.rollback(policy, revision)
    except Refusal:
        raise
    except InterpretOpsError as error:
        if gateway.audit is not None:
            gateway.audit.append(f"{change}_failed", **fields, why=str(error))
        raise AdminRefused(str(error)) from error
    return web.json_response(_entry(gateway, catalogue.entries[policy]))


async def pin_baseline(request: web.Request) -> web.Response:
    """Pin the policy's live firing window as its drift baseline. Recorded in the audit log."""
    gateway, policy = request.app[GATEWAY], request.match_info["id"]
    try:
        pinned = gateway.drift.pin(policy, request[ADMIN]).model_dump()
    except InterpretOpsError as error:
        raise AdminRefused(str(error)) from error
    if gateway.audit is not None:
        gateway.audit.append("baseline", policy=policy, **pinned)
    return web.json_response(pinned)


def _name(revision: Revision | None) -> str:
    return NONE if revision is None else revision.revision


def _check_named(named: str | None, target: Revision | None, change: str) -> None:
    """Raise `PolicyError` if the change would activate another revision than the one named."""
    if named is not None and target is not None and not target.revision.startswith(named):
        state = "the candidate now" if change == "promote" else "the previous one"
        raise PolicyError(f"revision = {named!r}, but {target.label} is {state}; review it, and name it")


async def _read_change(request: web.Request, change: str) -> tuple[dict[str, str] | None, str, str | None]:
    """Parse the body: the override if any, the target state, and the named revision."""
    raw = await read_body(request, max_bytes=_MAX_BODY_BYTES, timeout_s=10)
    body = parse_strict(raw) if raw.strip() else {}
    override, to, named = body.get("override"), body.get("to", "active"), body.get("revision")
    known = ("revision", "override", "to") if change == "promote" else ("revision",)
    if body.keys() - set(known):
        raise InvalidRequest(f"unknown fields in a {change}; known: {', '.join(known)}")
    if named is None and change == "promote":
        raise InvalidRequest(
            "revision is missing: name the candidate that you reviewed, by 12 or more hex digits of "
            '`candidate` in GET /admin/policies, as {"revision": "0123456789ab"}',
            param="revision",
        )
    if named is not None and not (isinstance(named, str) and _REVISION.fullmatch(named)):
        raise InvalidRequest("revision must be 12 to 64 hex digits", param="revision")
    if to not in ("active", "shadow"):
        raise InvalidRequest("to must be active or shadow", param="to")
    if override is None:
        return None, to, named
    if not isinstance(override, dict) or override.keys() != {"by", "why"}:
        raise InvalidRequest("override needs `by` and `why`, and nothing else", param="override")
    for name, value in override.items():
        if not isinstance(value, str) or not value.strip() or len(value) > _MAX_REASON:
            raise InvalidRequest(
                f"override.{name} must be a string of at most {_MAX_REASON} characters",
                param=f"override.{name}",
            )
    return override, to, named


async def resolve(request: web.Request) -> web.Response:
    """Dry run: which policy a request would get, and why.

    Body, all optional: ``model``, ``route``, ``policy`` (as in X-Steering-Policy), ``tenant``, ``key`` (ids).
    """
    gateway = request.app[GATEWAY]
    raw = await read_body(request, max_bytes=_MAX_BODY_BYTES, timeout_s=10)
    body = parse_strict(raw)
    if unknown := body.keys() - {"model", "route", "policy", "tenant", "key"}:
        known = "model, route, policy, tenant, key"
        raise InvalidRequest(f"unknown fields {sorted(unknown)}; known: {known}")
    if not all(isinstance(value, str) for value in body.values()):
        raise InvalidRequest("all fields must be strings")
    route = body.get("route", "/v1/chat/completions")
    if route not in ROUTES:
        raise InvalidRequest(f"route = {route!r}, but must be one of {', '.join(ROUTES)}", param="route")
    identity = _identity(gateway, body)
    identity.check_route(route)
    headers: CIMultiDict[str] = CIMultiDict()
    if "policy" in body:
        headers[POLICY_HEADER] = body["policy"]
    model = body.get("model") or min(gateway.fleet.require().served)
    caller = gateway.caller(route, CIMultiDictProxy(headers), model, identity)
    decision = decide(gateway.settings.bindings, caller, gateway.catalogue.entries)
    with gateway.catalogue.pin(decision.policy) as revision:
        return web.json_response(
            {
                "policy": decision.policy,
                "revision": NONE if revision is None else revision.revision,
                "mode": decision.mode,
                "asked_for": caller.choice,
                "model": caller.model,
                "engine_model": gateway.engine_model(caller.model),
                "route": route,
                "tenant": identity.tenant.id,
                "key": identity.key,
                "bindings": explain(gateway.settings.bindings, caller),
            }
        )


def _identity(gateway: Gateway, body: Mapping[str, str]) -> Identity:
    """The caller assumed in a dry run."""
    tenant, key = body.get("tenant"), body.get("key")
    try:
        if key is not None:
            found = Identity(gateway.access.tenant_of_key(key), key)
            if tenant not in (None, found.tenant.id):
                raise InvalidRequest(f"key = {key!r}, but that is a key of tenant {found.tenant.id!r}")
            return found
        return Identity(gateway.access.tenant(tenant) if tenant else Tenant(id=ANONYMOUS))
    except KeyError as error:
        raise InvalidRequest(f"{error.args[0]!r} is not a known tenant, nor a tenant's key") from None


async def audit_head(request: web.Request) -> web.Response:
    """The newest record's number and hash. Kept elsewhere, they prove that the log was not truncated."""
    audit = request.app[GATEWAY].audit
    if audit is None:
        raise AdminRefused("there is no audit log; set audit.path")
    head = audit.head
    return web.json_response(
        {
            "records": 0 if head is None else head.seq,
            "hash": None if head is None else head.hash,
            "failing": audit.failing,
        }
    )


async def show_metrics(request: web.Request) -> web.Response:
    """The metrics in Prometheus text format."""
    metrics = request.app[GATEWAY].metrics
    metrics.tasks.set(len(asyncio.all_tasks()))
    return web.Response(body=metrics.render(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _entry(gateway: Gateway, entry: Entry) -> dict[str, Any]:
    active = entry.active
    tally = gateway.shadows.tallies.get(entry.policy)
    return {
        **entry.summary(0 if active is None else gateway.catalogue.residency.pins(active)),
        "shadow": None if tally is None else tally.summary(),
        "drift": gateway.drift.summary(entry.policy),
        "canary": gateway.canary.summary(entry.policy),
        "suspended": gateway.catalogue.is_suspended(entry.policy),
    }
