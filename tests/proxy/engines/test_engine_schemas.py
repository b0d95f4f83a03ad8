"""The engine's request classes read every field that we send, including the seal."""

import hashlib
from typing import Any

import httpx
import pytest
from engines import EngineServer, vector_plan
from fake_engine import FakeEngine

from interpretops.engine_api import (
    ATTEST_ROUTE,
    NONCE_HEADER,
    NONCE_KEY,
    PASS_THROUGH,
    REFUSAL_HEADER,
    REVISION_KEY,
    SELF_TEST_ROUTE,
    Attestation,
    EngineCode,
    LoadedPlan,
    Receipt,
    RetiredPlan,
    SelfTest,
    plan_path,
    receipt_path,
    seal,
)
from interpretops.plan import POINTS
from proxy.openai_api.request_body import clean
from proxy.openai_api.routes import ROUTES

SEAL = seal("a" * 64, "b" * 32)
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "hi", "max_tokens": 4},
    "/v1/responses": {"input": "hi", "instructions": "be kind", "max_output_tokens": 4},
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "system": "be kind",
        "max_tokens": 4,
    },
}


@pytest.fixture(scope="module")
def schemas() -> dict[str, tuple[Any, ...]]:
    """The engine's request class for each route; several where the body decides."""
    from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
    from vllm.entrypoints.serve.tokenize import protocol

    return {
        "/v1/chat/completions": (ChatCompletionRequest,),
        "/v1/completions": (CompletionRequest,),
        "/v1/responses": (ResponsesRequest,),
        "/v1/messages": (AnthropicMessagesRequest,),
        "/v1/messages/count_tokens": (AnthropicCountTokensRequest,),
        "/tokenize": (protocol.TokenizeCompletionRequest, protocol.TokenizeChatRequest),
        "/detokenize": (protocol.DetokenizeRequest,),
    }


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_that_passes_is_one_the_engine_reads(
    schemas: dict[str, tuple[Any, ...]], path: str
) -> None:
    """The engine would silently drop a listed field that it does not know."""
    known = set().union(*(schema.model_fields for schema in schemas[path]))
    assert ROUTES[path].fields.keys() - known == set()


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_seal_reaches_the_sampling_parameters(
    schemas: dict[str, tuple[Any, ...]], path: str, stream: bool
) -> None:
    """On every route the plugin sees exactly the seal that the gateway set."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

    from steering_kernels.vllm_plugin.request_args import RequestArgs

    body = clean(ROUTES[path], {"model": "m", "stream": stream, "temperature": 0.5, **BODIES[path]})
    request = schemas[path][0].model_validate({**body, "cache_salt": "s", "vllm_xargs": SEAL})
    if path == "/v1/messages":
        request = AnthropicServingMessages.to_chat_completion_request(request)
    params = request.to_sampling_params(4, {})
    assert params.extra_args == SEAL
    assert RequestArgs.read(params.extra_args).revision == "a" * 64
    assert (params.temperature, params.max_tokens) == (0.5, 4)
    assert request.cache_salt == "s"


def test_every_generating_route_is_read(schemas: dict[str, tuple[Any, ...]]) -> None:
    """Every generating route is covered here."""
    assert {path for path, route in ROUTES.items() if route.generates} == BODIES.keys()
    assert schemas.keys() == ROUTES.keys()


def refused_calls() -> Any:
    """Refused calls, by name: method, path and payload."""
    lost, sealed = {**SEAL, REVISION_KEY: "f" * 64}, {NONCE_HEADER: SEAL[NONCE_KEY]}
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    text = {"model": "m", "prompt": "hi", "max_tokens": 2}
    damaged = b"no plan"
    asked = {
        "whole": ("/v1/completions", {**text, "vllm_xargs": lost}),
        "streamed": ("/v1/completions", {**text, "stream": True, "vllm_xargs": lost}),
        "several": ("/v1/completions", {**text, "prompt": ["a", "b"], "n": 2, "vllm_xargs": lost}),
        "chat": ("/v1/chat/completions", {**chat, "n": 2, "vllm_xargs": lost}),
        "chat streamed": ("/v1/chat/completions", {**chat, "stream": True, "vllm_xargs": lost}),
        "responses": ("/v1/responses", {"model": "m", "input": "hi", "stream": True, "vllm_xargs": lost}),
        "messages": ("/v1/messages", {**chat, "stream": True, "vllm_xargs": lost}),
        "unsealed": ("/v1/completions", text),
    }
    return {
        **{name: ("POST", path, {"json": body, "headers": sealed}) for name, (path, body) in asked.items()},
        "damaged plan": (
            *("PUT", plan_path(hashlib.sha256(damaged).hexdigest())),
            {"content": damaged},
        ),
        "other plan": ("PUT", plan_path("0" * 64), {"content": damaged}),
        "unknown receipt": ("GET", receipt_path("c" * 32), {}),
    }


def whole(kind: Any, reported: Any) -> Any:
    """Parse a message, and check that it has exactly the declared fields."""
    message = kind.parse(reported)
    assert message.body() == reported
    return message


@pytest.mark.engine
@pytest.mark.slow
async def test_fake_engine_answers_as_the_real_one_does(
    engine_server: EngineServer, engine: FakeEngine
) -> None:
    """Both send exactly the declared fields, so tests on the fake read nothing that the real engine does not
    send."""
    for socket in (engine_server.socket, engine.socket):
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=120) as client:
            attested = whole(Attestation, (await client.get(ATTEST_ROUTE)).json())
            plan = vector_plan(attested.spec(), 20.0, layer=1, seed=77)
            path = plan_path(plan.revision)
            loaded = whole(LoadedPlan, (await client.put(path, content=plan.to_bytes())).json())
            assert [rank.digest for rank in loaded.ranks] == [plan.digest()]
            attested = whole(Attestation, (await client.get(ATTEST_ROUTE)).json())
            assert attested.revisions() == {plan.revision} == attested.engines[0].resident.keys()
            assert attested.points == list(POINTS) == attested.engines[0].ranks[0].points
            for revision in (plan.revision, PASS_THROUGH):
                body = {"model": "m", "prompt": "hi", "max_tokens": 2, "vllm_xargs": seal(revision, "b" * 32)}
                assert (await client.post("/v1/completions", json=body)).status_code == 200
                receipt = whole(Receipt, (await client.get(receipt_path("b" * 32))).json())
                assert (receipt.revision, receipt.requests, receipt.finished) == (revision, 1, True)
            assert whole(RetiredPlan, (await client.delete(path)).json()).in_flight == 0
            assert whole(SelfTest, (await client.post(SELF_TEST_ROUTE)).json()).ok


@pytest.mark.engine
@pytest.mark.slow
async def test_fake_engine_refuses_as_the_real_one_does(
    engine_server: EngineServer, engine: FakeEngine
) -> None:
    """The fake's refusals match the real plugin's in status, code and format, so tests on the fake are
    valid."""

    async def answers(socket: Any) -> Any:
        found = {}
        transport = httpx.AsyncHTTPTransport(uds=str(socket))
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=120) as client:
            for name, (method, path, sent) in refused_calls().items():
                answer = await client.request(method, path, **sent)
                error = answer.json()["error"]
                found[name] = (
                    *(answer.status_code, answer.headers.get(REFUSAL_HEADER), error["code"]),
                    *(sorted(error), answer.headers["content-type"].partition(";")[0]),
                )
        return found

    real = await answers(engine_server.socket)
    assert real == await answers(engine.socket)
    assert {name: reported[:2] for name, reported in real.items()} == {
        **dict.fromkeys(
            ("whole", "streamed", "several", "chat", "chat streamed", "responses", "messages"),
            (503, EngineCode.NOT_RESIDENT),
        ),
        "unsealed": (400, EngineCode.INVALID_SEAL),
        "damaged plan": (400, EngineCode.INVALID_PLAN),
        "other plan": (400, EngineCode.INVALID_PLAN),
        "unknown receipt": (404, EngineCode.UNKNOWN_NONCE),
    }
