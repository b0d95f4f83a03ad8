"""OpenTelemetry: one span per request with `gen_ai.*` attributes and receipt figures, without content."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from interpretops.errors import ConfigError
from interpretops.settings.gateway import TracingSettings
from proxy.observe.request_context import RequestContext
from proxy.process.off_loop import off_loop

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

_OPERATIONS: Final = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
}
"""`gen_ai.operation.name` from OpenTelemetry's conventions for generative AI. Other routes get no span."""


class Tracing:
    """Creates spans and exports them in the background. Does nothing without an endpoint."""

    def __init__(self, settings: TracingSettings, version: str) -> None:
        self._tracer: Tracer | None = None
        self._provider: Any = None
        self._api: Any = None
        if settings.endpoint is None:
            return
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(
                f"tracing.endpoint = {settings.endpoint!r}, but {error.name} is not installed; "
                "pip install 'interpretops[tracing]'"
            ) from error
        self._api, self._propagator = trace, TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(settings.share)),
            resource=Resource.create({"service.name": settings.service, "service.version": version}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(endpoint=f"{settings.endpoint.rstrip('/')}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("interpretops.gateway", version)

    def begin(self, request: web.Request, route: str, context: RequestContext) -> Span | None:
        """Start a request's span: child of the caller's (`traceparent`), parent of the engine's."""
        if self._tracer is None or route not in _OPERATIONS:
            return None
        parent = self._propagator.extract({key.lower(): value for key, value in request.headers.items()})
        operation = _OPERATIONS[route]
        attributes = {"gen_ai.operation.name": operation, "gen_ai.provider.name": "vllm", "http.route": route}
        span = self._tracer.start_span(operation, parent, self._api.SpanKind.SERVER, attributes)
        self._propagator.inject(context.engine_headers, self._api.set_span_in_context(span))
        return span

    def end(self, span: Span | None, route: str, context: RequestContext, status: int) -> None:
        """Record the outcome, and end the span."""
        if span is None:
            return
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("interpretops.request_id", context.request_id)
        span.set_attribute("interpretops.tenant", context.tenant)
        span.set_attribute("interpretops.policy", context.policy)
        span.set_attribute("interpretops.revision", context.revision)
        if context.model is not None:
            span.set_attribute("gen_ai.request.model", context.model)
            span.update_name(f"{_OPERATIONS[route]} {context.model}")
        if context.tokens is not None:
            span.set_attribute("interpretops.tokens_evaluated", context.evaluated)
            span.set_attribute("interpretops.edits_applied", context.edits)
            span.set_attribute("interpretops.gates_fired", context.gates)
            span.set_attribute("interpretops.refusals", context.refusals)
        if context.ttft_s is not None:
            span.set_attribute("gen_ai.response.time_to_first_chunk", context.ttft_s)
        if context.reason is not None:
            span.set_attribute("error.type", context.reason)
            if status >= 500 or status == 200:
                span.set_status(self._api.Status(self._api.StatusCode.ERROR, context.reason))
        span.end()

    async def close(self) -> None:
        """Export the remaining spans."""
        if self._provider is not None:
            await off_loop(self._provider.shutdown)
