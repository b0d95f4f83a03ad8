"""The admin app on its own listener: policies, reload, promotion, dry runs and metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from multidict import CIMultiDict, CIMultiDictProxy

from interpretops.errors import InterpretOpsError, PolicyError
from interpretops.settings import Tenant
from interpretops.settings.access import ANONYMOUS
from proxy.admin.bodies import Promotion, ResolveRequest, Rollback
from proxy.admin.reload import reload_everything
from proxy.errors import EngineNotReady, FieldNotAllowed, InvalidRequest, Refusal
from proxy.observe.metrics import CONTENT_TYPE_LATEST
from proxy.openai_api.headers import POLICY_HEADER
from proxy.openai_api.request_body import parse_strict, read_body
from proxy.policies.binding import NONE, decide, explain
from proxy.policies.entry import Entry
from proxy.policies.policy_files import Revision
from proxy.relay.accounting import route_label
from proxy.relay.health import HEALTH, add_health
from proxy.relay.middleware import respond_in_openai_format
from proxy.state import GATEWAY, Gateway
from proxy.tenants.access import Identity, names_this_machine

ADMIN: web.RequestKey[str] = web.RequestKey("admin", str)
"""Name of the authenticated admin, for the audit log."""
_MAX_BODY_BYTES = 64 * 1024


class AdminRefused(Refusal):
    """The action cannot be done now; the message says why."""

    code = "admin_refused"
    status = 409


def make_admin_app(gateway: Gateway) -> web.Application:
    """The app that operators and Prometheus call."""
    app = web.Application(
        middlewares=[gateway.stall_guard.mark, respond_in_openai_format, refuse_browsers, authorize]
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
    """Promote a candidate (body: `Promotion`), or roll back to the previous revision (`Rollback`).

    Recorded before it is done. Files can change during a review, so nothing is done if another revision has
    taken the named one's place.
    """
    gateway = request.app[GATEWAY]
    policy, catalogue, change = request.match_info["id"], gateway.catalogue, request.match_info["change"]
    wish = await _read_change(request, change)
    override = wish.override if isinstance(wish, Promotion) else None
    to = wish.to if isinstance(wish, Promotion) else "active"
    fields: dict[str, Any] = {"policy": policy, "by": request[ADMIN], "to": to, "asked": wish.revision}
    if override is not None:
        if gateway.audit is None:
            raise AdminRefused("an override must be recorded, but there is no audit log; set audit.path")
        fields["override"] = override.model_dump()
    try:
        found = catalogue.entries.get(policy)
        before = None if found is None else found.previous
        target = catalogue.candidate(policy) if change == "promote" else before
        fields["from"] = _name(None if found is None else found.active)
        fields["revision"] = revision = _name(target)
        _check_named(wish.revision, target, change)
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


async def _read_change(request: web.Request, change: str) -> Promotion | Rollback:
    raw = await read_body(request, max_bytes=_MAX_BODY_BYTES, timeout_s=10)
    body = parse_strict(raw) if raw.strip() else {}
    return Promotion.read(body) if change == "promote" else Rollback.read(body)


async def resolve(request: web.Request) -> web.Response:
    """Dry run: which policy a request would get, and why. Body: `ResolveRequest`."""
    gateway = request.app[GATEWAY]
    raw = await read_body(request, max_bytes=_MAX_BODY_BYTES, timeout_s=10)
    asked = ResolveRequest.read(parse_strict(raw))
    identity = _identity(gateway, asked)
    identity.check_route(asked.route)
    headers: CIMultiDict[str] = CIMultiDict()
    if asked.policy is not None:
        headers[POLICY_HEADER] = asked.policy
    model = asked.model or min(gateway.fleet.require().served)
    caller = gateway.caller(asked.route, CIMultiDictProxy(headers), model, identity)
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
                "route": asked.route,
                "tenant": identity.tenant.id,
                "key": identity.key,
                "bindings": explain(gateway.settings.bindings, caller),
            }
        )


def _identity(gateway: Gateway, asked: ResolveRequest) -> Identity:
    """The caller assumed in a dry run."""
    tenant, key = asked.tenant, asked.key
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
