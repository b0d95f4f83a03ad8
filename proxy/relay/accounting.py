"""The account of a request that has ended: metrics, drift, transcript, audit log, and a line in the log."""

from __future__ import annotations

from aiohttp import web

from proxy.observe.request_context import TRAIL, Trail
from proxy.relay.health import HEALTH
from proxy.state import GATEWAY


def account(request: web.Request, status: int, total_s: float) -> None:
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
