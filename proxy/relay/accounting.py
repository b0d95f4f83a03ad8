"""Records a finished request: metrics, drift, transcript, audit log and a log line."""

from __future__ import annotations

from aiohttp import web

from proxy.observe.request_context import REQUEST_CONTEXT, RequestContext
from proxy.relay.health import HEALTH
from proxy.state import GATEWAY


def record_request(request: web.Request, status: int, total_s: float) -> None:
    gateway, context, route = request.app[GATEWAY], request[REQUEST_CONTEXT], route_label(request)
    if route in HEALTH or route == "/metrics":
        return
    metrics = gateway.metrics
    metrics.requests.labels(route, context.tenant, context.policy, str(status)).inc()
    metrics.outcomes.labels(_outcome(status, context)).inc()
    if context.reason is None and context.engine_s:
        metrics.e2e.labels(context.policy).observe(total_s)
        metrics.overhead.observe(max(0.0, total_s - context.engine_s))
    if context.ttft_s is not None:
        metrics.ttft.labels(context.policy).observe(context.ttft_s)
    if context.evaluated:
        metrics.tokens_evaluated.labels(context.policy).inc(context.evaluated)
        metrics.edits_applied.labels(context.policy).inc(context.edits)
        metrics.gates_fired.labels(context.policy).inc(context.gates)
        metrics.requests_gated.labels(context.policy).inc(context.gates > 0)
        metrics.policy_refusals.labels(context.policy).inc(context.refusals)
        gateway.drift.note(context)
    if context.transcript is not None:
        gateway.transcripts.keep(context, status)
    if gateway.audit is not None and context.tenant != "none":
        gateway.audit.append(
            "request",
            request_id=context.request_id,
            tenant=context.tenant,
            key=context.key,
            route=route,
            policy=context.policy,
            revision=context.revision,
            status=status,
            reason=context.reason,
            stream=context.stream,
            tokens=context.tokens,
            edits=context.edits,
            gates=context.gates,
            refusals=context.refusals,
        )
    gateway.log.info(
        "request",
        request_id=context.request_id,
        route=route,
        status=status,
        tenant=context.tenant,
        key=context.key,
        policy=context.policy,
        revision=context.revision[:12],
        stream=context.stream,
        reason=context.reason,
        duration_ms=round(total_s * 1e3, 3),
        ttft_ms=None if context.ttft_s is None else round(context.ttft_s * 1e3, 3),
    )


def _outcome(status: int, context: RequestContext) -> str:
    """One of `OUTCOMES`. A stream that fails midway has already sent status 200."""
    if context.reason == "client_gone":
        return "client_gone"
    if status >= 500 or (status == 200 and context.reason is not None):
        return "failed"
    return "answered" if status < 400 else "refused"


def route_label(request: web.Request) -> str:
    """A metric label with few values: the route's pattern, never the request's path."""
    resource = request.match_info.route.resource
    return "unknown" if resource is None else resource.canonical
