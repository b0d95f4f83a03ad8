"""An engine that answers at once, so that a request's time is only the path to it.

    python -m benchmarks.mock_engine engine|relay PORT [UPSTREAM]

`engine` implements the plugin's contract (attestation, plans, receipts) and answers chats with one fixed
message, or with a stream of 64 events. `relay` passes chats to UPSTREAM and back, byte for byte: the minimum
that an aiohttp proxy can do.
"""

import asyncio
import json
import sys
from typing import Any

import aiohttp
from aiohttp import web

from interpretops.engine_api import (
    ATTEST_ROUTE,
    PLAN_ROUTE,
    RECEIPT_HEADER,
    REVISION_KEY,
    SELF_TEST_ROUTE,
    Attestation,
    EngineMessage,
    LoadedPlan,
    Rank,
    RankDigest,
    RankGroup,
    Receipt,
    RetiredPlan,
    SelfTest,
    SpecialTokenList,
    describe_model,
    receipt_event,
)
from interpretops.plan import ModelSpec, read_plan

MODEL = "mock"
SPEC = ModelSpec(MODEL, "0" * 64, "LlamaForCausalLM", 8, 4, 2, 2, 4, 32)
CHUNKS = 64
USAGE = {"prompt_tokens": 12, "completion_tokens": CHUNKS, "total_tokens": 12 + CHUNKS}
ANSWER = json.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "word " * CHUNKS},
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }
).encode()
EVENT = (
    b"data: "
    + json.dumps(
        {
            "id": "chatcmpl-0",
            "object": "chat.completion.chunk",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "delta": {"content": "word "}, "finish_reason": None}],
        }
    ).encode()
    + b"\n\n"
)


class MockEngine:
    """An engine that only stores plans and answers at once."""

    def __init__(self) -> None:
        self.plans: dict[str, str] = {}

    def app(self) -> web.Application:
        """Its routes."""
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/health", _health)
        app.router.add_get("/v1/models", _models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get(ATTEST_ROUTE, self._attest)
        app.router.add_post(SELF_TEST_ROUTE, _selftest)
        app.router.add_put(PLAN_ROUTE, self._load)
        app.router.add_delete(PLAN_ROUTE, self._retire)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = json.loads(await request.read())
        sealed = body.get("vllm_xargs")
        receipt = _receipt(sealed[REVISION_KEY]).line() if sealed else ""
        if not body.get("stream"):
            headers = {RECEIPT_HEADER: receipt} if sealed else None
            return web.Response(body=ANSWER, content_type="application/json", headers=headers)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        for _ in range(CHUNKS):
            await response.write(EVENT)
            await asyncio.sleep(0)
        end = receipt_event(receipt) if sealed else b""
        await response.write(b"data: [DONE]\n\n" + end)
        return response

    async def _attest(self, _request: web.Request) -> web.Response:
        rank = Rank(rank=0, resident=self.plans, model=describe_model(SPEC))
        return _answer(
            Attestation(
                plugin_version="0",
                vllm_version="0",
                boot_id="mock",
                model=describe_model(SPEC),
                engines=[RankGroup(ranks=[rank])],
                special_tokens=SpecialTokenList(ids={"<|end|>": 0}),
            )
        )

    async def _load(self, request: web.Request) -> web.Response:
        revision = request.match_info["revision"]
        self.plans[revision] = read_plan(await request.read()).digest()
        return _answer(LoadedPlan(revision=revision, ranks=[RankDigest(rank=0, digest=self.plans[revision])]))

    async def _retire(self, request: web.Request) -> web.Response:
        revision = request.match_info["revision"]
        self.plans.pop(revision, None)
        return _answer(RetiredPlan(revision=revision, in_flight=0))


def _answer(message: EngineMessage) -> web.Response:
    return web.json_response(message.body())


def _receipt(revision: str) -> Receipt:
    return Receipt(revision=revision, requests=1, tokens_evaluated=75, edits_applied=75, finished=True)


class Relay:
    """Passes chats on to one upstream."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream

    def app(self) -> web.Application:
        """Its only route."""
        app = web.Application(client_max_size=2**26)
        app.cleanup_ctx.append(self._session)
        app.router.add_post("/v1/chat/completions", self._pass_on)
        app.router.add_get("/health", _health)
        return app

    async def _session(self, _app: web.Application) -> Any:
        self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        yield
        await self.session.close()

    async def _pass_on(self, request: web.Request) -> web.StreamResponse:
        url, headers = self.upstream + request.path, {"Content-Type": "application/json"}
        async with self.session.post(url, data=await request.read(), headers=headers) as upstream:
            if upstream.content_type != "text/event-stream":
                return web.Response(body=await upstream.read(), content_type=upstream.content_type)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


async def _health(_request: web.Request) -> web.Response:
    return web.Response()


async def _models(_request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": MODEL, "max_model_len": 2048}]})


async def _selftest(_request: web.Request) -> web.Response:
    return _answer(SelfTest(ok=True))


def main() -> None:
    """Serve until killed."""
    kind, port, *upstream = sys.argv[1:]
    app = MockEngine().app() if kind == "engine" else Relay(upstream[0]).app()
    web.run_app(app, host="127.0.0.1", port=int(port), access_log=None, print=None)


if __name__ == "__main__":
    main()
