"""A small fake engine for what cannot be provoked on a real one."""

import asyncio
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from interpretops.engine_api import (
    ATTEST_ROUTE,
    NONCE_HEADER,
    NONCE_KEY,
    PASS_THROUGH,
    PLAN_ROUTE,
    RECEIPT_HEADER,
    RECEIPT_ROUTE,
    REFUSAL_HEADER,
    REVISION_KEY,
    SELF_TEST_ROUTE,
    Attestation,
    EngineCode,
    EngineMessage,
    EngineRefusal,
    LoadedPlan,
    Rank,
    RankDigest,
    RankGroup,
    Receipt,
    ResidentPlan,
    RetiredPlan,
    SelfTest,
    SpecialTokenList,
    describe_model,
    receipt_event,
)
from interpretops.errors import PlanError
from interpretops.plan import POINTS, ModelSpec, Plan, read_plan
from interpretops.plan.shard import Shard
from proxy.openai_api.routes import ROUTES

MODEL = "tiny-model"
SPEC = ModelSpec(MODEL, "f" * 64, "LlamaForCausalLM", 8, 4, 2, 2, 4, 32)
SPECIAL = SpecialTokenList(ids={"<|end|>": 0, "<|begin|>": 1}, first=1)


@dataclass
class FakeEngine:
    """An in-memory engine that follows the plugin's contract; `trick` names the one thing it does wrong."""

    socket: Path
    trick: str = ""
    sick: int = 0
    """How many more health checks it will fail."""
    silences: int = 0
    """Number of calls while its workers hung."""
    plans: dict[str, Plan] = field(default_factory=dict)
    room: int = 1000
    """Most plans that it accepts."""
    retired: list[str] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    plain: list[dict[str, Any]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    let_go: asyncio.Event = field(default_factory=asyncio.Event)
    aborted: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    receipts: dict[str, Receipt] = field(default_factory=dict)
    traced: list[str] = field(default_factory=list)
    """`traceparent` headers of its requests."""
    script: Callable[[dict[str, Any]], list[dict[str, Any]]] | None = None
    """Replaces its answers: one body, or the events of a stream."""
    refusal: str | None = None
    """Refuses every request with this code; a newer plugin may have unknown codes."""
    more: dict[str, int] = field(default_factory=dict)
    """Extra fields of its receipts."""
    tcp: tuple[str, int] | None = None
    """TCP address to listen on instead of the socket."""
    huge: int = 0
    """Size of its unstreamed answers in MiB, when not 0."""
    written: int = 0
    """MiB of them written before the connection closed."""
    special: SpecialTokenList | None = SPECIAL
    """The special tokens it reports."""
    boot_id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    async def restart(self) -> None:
        """Act as another process at the same address."""
        await self.runner.cleanup()
        self.boot_id = secrets.token_hex(8)
        await self._listen()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["FakeEngine"]:
        await self._listen()
        try:
            yield self
        finally:
            await self.runner.cleanup()

    async def _listen(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.router.add_get("/health", self._health)
        app.router.add_get("/v1/models", self._models)
        for path, route in ROUTES.items():
            app.router.add_post(path, self._generate if route.generates else self._plain)
        app.router.add_get(ATTEST_ROUTE, self._attest)
        app.router.add_post(SELF_TEST_ROUTE, self._selftest)
        app.router.add_put(PLAN_ROUTE, self._load)
        app.router.add_delete(PLAN_ROUTE, self._retire)
        app.router.add_get(RECEIPT_ROUTE, self._receipt)
        self.runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await self.runner.setup()
        self.socket.unlink(missing_ok=True)
        if self.tcp is None:
            await web.UnixSite(self.runner, str(self.socket)).start()
        else:
            await web.TCPSite(self.runner, *self.tcp).start()

    async def _health(self, _request: web.Request) -> web.Response:
        if self.sick:
            self.sick -= 1
            return web.Response(status=503)
        return web.Response(status=503 if self.trick == "unhealthy" else 200)

    async def _models(self, _request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL, "root": "/secret/path", "max_model_len": 64}]})

    async def _attest(self, _request: web.Request) -> web.Response:
        if self.trick == "workers_hang":
            self.silences += 1
            await self.go_on.wait()
        if self.trick == "no_plugin":
            return web.json_response({"error": {"message": "Not Found", "code": 404}}, status=404)
        model = describe_model(SPEC) | ({"fingerprint": "e" * 64} if self.trick == "other_model" else {})
        held = {revision: plan.digest() for revision, plan in self.plans.items()}
        admitted = {
            name: ResidentPlan(digest=reported, in_flight=0, retired=False) for name, reported in held.items()
        }
        return answer(
            Attestation(
                plugin_version="0",
                vllm_version="0",
                boot_id=self.boot_id,
                model=model,
                points=list(POINTS),
                engines=[
                    RankGroup(
                        ranks=[Rank(rank=0, resident=held, model=describe_model(SPEC), points=list(POINTS))],
                        resident=admitted,
                    )
                ],
                special_tokens=self.special,
            )
        )

    async def _selftest(self, _request: web.Request) -> web.Response:
        if self.trick == "selftest_fails":
            return answer(SelfTest(ok=False, reason="nothing changed"), 503)
        return answer(SelfTest(ok=True))

    async def _load(self, request: web.Request) -> web.Response:
        if self.trick == EngineCode.TABLE_FULL or len(self.plans) >= self.room:
            return _refuse(EngineCode.TABLE_FULL, "full")
        revision, data = request.match_info["revision"], await request.read()
        if hashlib.sha256(data).hexdigest() != revision:
            return _refuse(EngineCode.INVALID_PLAN, "the plan file is damaged")
        try:
            plan = read_plan(data)
        except PlanError as error:
            return _refuse(EngineCode.INVALID_PLAN, str(error))
        self.plans[revision] = plan
        if self.trick == "load_unanswered":
            return web.Response(text="<html>")
        halves = {"two_ranks": (0, 1), "one_half": (0, 1), "same_half": (0, 0)}.get(self.trick, (0,))
        digests = [Shard(half, len(halves)).of_plan(plan).digest() for half in halves]
        ranks = [
            RankDigest(rank=index, digest=digest, shard=index, shards=len(halves))
            for index, digest in enumerate(["0" * 64] if self.trick == "wrong_digest" else digests)
        ]
        if self.trick == "one_half":
            ranks = ranks[:1]
        return answer(LoadedPlan(revision=revision, ranks=ranks))

    async def _retire(self, request: web.Request) -> web.Response:
        revision = request.match_info["revision"]
        self.plans.pop(revision, None)
        self.retired.append(revision)
        self.let_go.set()
        return answer(RetiredPlan(revision=revision, in_flight=0))

    async def _receipt(self, request: web.Request) -> web.Response:
        receipt = self.receipts.pop(request.match_info["nonce"], None)
        if receipt is None:
            return _refuse(EngineCode.UNKNOWN_NONCE, "no receipt for this nonce")
        return answer(receipt)

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.trick == "huge_error":
            return await self._write_huge(request, 400)
        if self.trick == "busy":
            return web.json_response({"error": {"message": "later", "code": 503}}, status=503)
        if self.trick == "inner_failure":
            return web.json_response({"error": {"message": "secret", "code": 500}}, status=500)
        self.seen.append(body)
        self.traced.append(request.headers.get("traceparent", ""))
        self.arrived.set()
        revision = body.get("vllm_xargs", {}).get(REVISION_KEY)
        if not isinstance(revision, str):
            return _refuse(EngineCode.INVALID_SEAL, "every request must name a revision")
        if self.refusal is not None:
            return _refuse(self.refusal, "secret")
        if revision not in (PASS_THROUGH, *self.plans):
            return _refuse(EngineCode.NOT_RESIDENT, f"revision {revision[:12]} is not resident")
        try:
            if self.trick in ("hold", f"hold {revision}"):
                await self.go_on.wait()
            return await self._answer(request, body, revision)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted.set()
            raise

    async def _answer(self, request: web.Request, body: dict[str, Any], revision: str) -> web.StreamResponse:
        requests = _engine_requests(body)
        receipt = Receipt(
            revision="a" * 64 if self.trick == "wrong_revision" else revision,
            requests=requests,
            tokens_evaluated=0 if self.trick == "nothing_evaluated" else 3 * requests,
            finished=True,
        )
        if self.trick != "no_receipt":
            self.receipts[body["vllm_xargs"][NONCE_KEY]] = receipt.model_copy(update=self.more)
        if self.huge and not body.get("stream"):
            return await self._write_huge(request, 200, self._take(request))
        reported = None if self.script is None else self.script(body)
        if not body.get("stream"):
            choice = {"text": revision, "message": {"role": "assistant", "content": revision}}
            usage = {"completion_tokens": 3}
            plain = {"id": "x", "choices": [choice], "model": MODEL, "usage": usage}
            carried = self._take(request)
            headers = {RECEIPT_HEADER: carried} if carried else None
            return web.json_response(plain if reported is None else reported[0], headers=headers)
        response = web.StreamResponse()
        response.content_type = "text/event-stream"
        await response.prepare(request)
        end = ROUTES[request.path].end
        for event in reported or ():
            named = f"event: {event['type']}\n" if ROUTES[request.path].named_events else ""
            await response.write(f"{named}data: {json.dumps(event)}\n\n".encode())
        for index in range(4 if reported is None else 0):
            await response.write(b'data: {"id":"x","n":%d,"text":"[DONE] error"}\n\n' % index)
            if self.trick == "dies" and index == 1:
                await response.write(b'data: {"id":"x","n"')
                assert request.transport is not None
                request.transport.abort()
            if self.trick == "hold_stream" and index == 1:
                await self.go_on.wait()
        if self.trick == "error_event":
            await response.write(b'data: {"error": {"message": "engine core died"}}\n\n')
        if self.trick != "no_done":
            await response.write(end + (b"data: {}\n\n" if end.endswith(b"\n") else b"\n\n"))
        if carried := self._take(request):
            await response.write(receipt_event(carried))
        return response

    async def _write_huge(self, request: web.Request, status: int, receipt: str = "") -> web.StreamResponse:
        response = web.StreamResponse(status=status)
        response.content_type = "application/json"
        if receipt:
            response.headers[RECEIPT_HEADER] = receipt
        if self.trick == "huge_stated":
            response.content_length = self.huge * 2**20
        await response.prepare(request)
        for _ in range(self.huge):
            await response.write(b" " * 2**20)
            self.written += 1
        return response

    def _take(self, request: web.Request) -> str:
        """The receipt, as sent along with a finished answer."""
        if self.trick == "older_plugin":
            return ""
        receipt = self.receipts.pop(request.headers.get(NONCE_HEADER, ""), None)
        return "" if receipt is None else receipt.line()

    async def _plain(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if self.huge:
            return await self._write_huge(request, 200)
        self.plain.append(body)
        return web.json_response({"count": 3, "tokens": [1, 2, 3]})


def _refuse(code: str, message: str) -> web.Response:
    """Matches the plugin; `test_engine_schemas.py` compares the two."""
    refusal = EngineRefusal(error=EngineRefusal.Error(message=message, code=str(code)))
    return answer(refusal, refusal.code.status, {REFUSAL_HEADER: str(code)})


def answer(message: EngineMessage, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """One of the contract's messages."""
    return web.json_response(message.body(), status=status, headers=headers)


def _engine_requests(body: dict[str, Any]) -> int:
    """How many engine requests vLLM makes of one HTTP request."""
    prompt = body.get("prompt", "")
    lists = isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt)
    answers: int = body.get("n", 1)
    return (len(prompt) if lists else 1) * answers
