"""Spans of requests, received over real OTLP/HTTP."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from fake_engine import FakeEngine
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from running_gateway import Start

from interpretops.errors import ConfigError
from interpretops.settings import load_settings
from proxy.gateway import make_app

PARENT = "00-" + "ab" * 16 + "-" + "cd" * 8 + "-01"


@pytest.fixture
async def collector() -> AsyncIterator[Any]:
    """A span collector: its address, and a queue of received spans."""
    spans: asyncio.Queue[Any] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        asked = ExportTraceServiceRequest.FromString(await request.read())
        for resource in asked.resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    spans.put_nowait((resource.resource, span))
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("/")), spans
    await server.close()


def _attributes(span: Any) -> dict[str, Any]:
    return {
        one.key: one.value.string_value or one.value.int_value or one.value.double_value
        for one in span.attributes
    }


async def test_request_is_a_span_in_its_callers_trace(
    start: Start, engine: FakeEngine, collector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The span continues the caller's trace, and names model, policy and receipt but no content."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    address, spans = collector
    front = await start("calm", **{"tracing.endpoint": address})
    engine.more = {"edits_applied": 5, "gates_fired": 2}
    secret = "the canary sings at midnight"
    status, _, _ = await front.chat(
        model="tiny-model+calm",
        messages=[{"role": "user", "content": secret}],
        headers={"traceparent": PARENT},
    )
    assert status == 200
    resource, span = await asyncio.wait_for(spans.get(), 10)
    found = _attributes(span)
    assert span.trace_id.hex() == "ab" * 16
    assert span.parent_span_id.hex() == "cd" * 8
    assert span.name == "chat tiny-model"
    assert found["gen_ai.operation.name"] == "chat"
    assert found["gen_ai.request.model"] == "tiny-model"
    assert (found["interpretops.policy"], found["interpretops.tenant"]) == ("calm", "anonymous")
    assert found["interpretops.revision"] in engine.plans
    assert (found["interpretops.edits_applied"], found["http.response.status_code"]) == (5, 200)
    assert secret not in str(span)
    assert any(one.value.string_value == "interpretops-gateway" for one in resource.attributes)
    assert engine.traced[-1].split("-")[1:3] == ["ab" * 16, span.span_id.hex()]


async def test_refusal_is_an_error_of_its_span(
    start: Start, engine: FakeEngine, collector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A withheld answer and an invalid request end their spans with the error code."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    address, spans = collector
    front = await start("calm", **{"tracing.endpoint": address})
    engine.trick = "no_receipt"
    await front.chat(model="tiny-model+calm")
    _, span = await asyncio.wait_for(spans.get(), 10)
    assert (_attributes(span)["error.type"], span.status.code) == ("receipt_failed", 2)
    await front.chat(model="nobody")
    _, span = await asyncio.wait_for(spans.get(), 10)
    assert (_attributes(span)["error.type"], span.status.code) == ("model_not_found", 0)


async def test_request_that_is_not_traced_is_answered(
    start: Start, engine: FakeEngine, collector: Any
) -> None:
    """Requests of unsampled traces, or with share 0, are answered and send no span."""
    address, spans = collector
    front = await start("calm", **{"tracing.endpoint": address, "tracing.share": 0.0})
    for headers in ({}, {"traceparent": PARENT[:-1] + "0"}):
        status, _, body = await front.chat(model="tiny-model+calm", headers=headers)
        assert (status, body["choices"][0]["text"]) == (200, *engine.plans)
    await front.apps.gateway.tracing.close()
    assert spans.empty()


async def test_unreachable_collector_costs_no_answer(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no collector at the address, requests are answered and the gateway stops in time."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    front = await start("calm", **{"tracing.endpoint": "http://127.0.0.1:9"})
    status, _, _ = await front.chat(model="tiny-model+calm")
    assert status == 200


async def test_without_an_endpoint_the_library_is_not_needed(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenTelemetry is imported only if tracing is on; if it is missing then, the error names the remedy."""
    import builtins
    import sys

    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError("no", name=name)
        return real(name, *rest, **more)

    for name in [name for name in sys.modules if name.startswith("opentelemetry.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", refuse)
    front = await start("calm")
    assert (await front.chat(model="tiny-model+calm"))[0] == 200
    settings = load_settings(overrides={"tracing.endpoint": "http://x"}, environ={})
    with pytest.raises(ConfigError, match=r"interpretops\[tracing\]"):
        make_app(settings, lambda _: None, None)
