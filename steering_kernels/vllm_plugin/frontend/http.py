"""The plugin's HTTP routes for the gateway: plans, attestation, self-test and receipts."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from interpretops.engine_api import (
    ATTEST_ROUTE,
    HOLDER_HEADER,
    PLAN_ROUTE,
    RECEIPT_ROUTE,
    REFUSAL_HEADER,
    SELF_TEST_ROUTE,
    Attestation,
    EngineCode,
    EngineMessage,
    EngineRefusal,
    RetiredPlan,
    SelfTest,
    SpecialTokenList,
)
from steering_kernels.vllm_plugin.core.holders import Holders
from steering_kernels.vllm_plugin.frontend.answer_receipt import AnswerReceipt
from steering_kernels.vllm_plugin.frontend.engine_cores import EngineCores
from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS
from steering_kernels.vllm_plugin.frontend.self_test import run_self_test
from steering_kernels.vllm_plugin.frontend.special_tokens import describe_special_tokens

MAX_PLAN_BYTES = 64 * 1024 * 1024


def make_plugin() -> SteeringEndpoints:
    """Entry point `vllm.endpoint_plugins`."""
    return SteeringEndpoints()


class SteeringEndpoints:
    """vLLM's endpoint plugin protocol."""

    name = "interpretops"
    required_tasks = None

    def __init__(self) -> None:
        self.boot_id = secrets.token_hex(8)
        """New after every start, so that the gateway notices an engine that has lost its plans."""
        self._client: Any = None
        self._special_tokens: SpecialTokenList | None = None
        self._holders = Holders()
        self._changing = asyncio.Lock()
        """Held while plans are loaded or retired: one gateway may release a plan just as another loads it."""
        self._testing = asyncio.Lock()
        """Held during a self-test: concurrent ones would retire each other's probe plans."""

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes."""
        app.put(PLAN_ROUTE)(self.put_plan)
        app.delete(PLAN_ROUTE)(self.delete_plan)
        app.get(ATTEST_ROUTE)(self.attest)
        app.post(SELF_TEST_ROUTE)(self.self_test)
        app.get(RECEIPT_ROUTE)(self.receipt)
        app.add_middleware(AnswerReceipt)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Called by vLLM with the engine client."""
        self._client = engine_client

    async def put_plan(self, revision: str, request: Request) -> Response:
        """Make a plan resident on all ranks of all engine cores. Every rank must report the plan's digest."""
        data = bytearray()
        async for chunk in request.stream():
            data += chunk
            if len(data) > MAX_PLAN_BYTES:
                return _error(EngineCode.PLAN_TOO_LARGE, f"plan exceeds {MAX_PLAN_BYTES} bytes")
        if hashlib.sha256(data).hexdigest() != revision:
            return _error(
                EngineCode.INVALID_PLAN, f"body's sha256 is not {revision}: the plan file is damaged"
            )
        async with self._changing:
            return await self._load(_holder(request), revision, bytes(data))

    async def _load(self, holder: str, revision: str, data: bytes) -> Response:
        cores = EngineCores(self._client)
        answer = await cores.load(revision, data)
        if isinstance(answer, EngineRefusal):
            if self._holders.release(holder, revision):
                await cores.retire(revision)
            return _error(answer.code, answer.message)
        self._holders.renew(holder)
        self._holders.hold(holder, revision)
        return _answer(answer)

    async def delete_plan(self, revision: str, request: Request) -> Response:
        """Retire a revision unless another gateway holds it."""
        async with self._changing:
            if self._holders.release(_holder(request), revision):
                return _answer(await EngineCores(self._client).retire(revision))
        return _answer(RetiredPlan(revision=revision, in_flight=0))

    async def attest(self, request: Request) -> Response:
        """The contents of every rank of every engine core. First retires plans that no live gateway holds."""
        async with self._changing:
            self._holders.renew(_holder(request))
            for revision in self._holders.orphans():
                await EngineCores(self._client).retire(revision)
        return _answer(await self._attest())

    async def self_test(self) -> Response:
        """Test through the running model that edits act on every rank."""
        async with self._testing:
            failure = await run_self_test(self._client, EngineCores(self._client), await self._attest())
        if failure is not None:
            return _answer(SelfTest(ok=False, reason=failure), status=503)
        return _answer(SelfTest(ok=True))

    async def receipt(self, nonce: str) -> Response:
        """The receipt of an answer that was sent without it. Can be fetched once."""
        receipt = RECEIPTS.take(nonce)
        if receipt is None:
            return _error(EngineCode.UNKNOWN_NONCE, "no receipt for this nonce")
        return _answer(receipt)

    async def _attest(self) -> Attestation:
        import vllm

        from interpretops import __version__

        engines = await EngineCores(self._client).attest()
        if self._special_tokens is None:
            self._special_tokens = describe_special_tokens(self._client.tokenizer)
        first = engines[0].ranks[0]
        return Attestation(
            plugin_version=__version__,
            vllm_version=vllm.__version__,
            boot_id=self.boot_id,
            model=first.model,
            points=first.points,
            special_tokens=self._special_tokens,
            passthrough=all(engine.pass_through for engine in engines),
            engines=engines,
        )


def _holder(request: Request) -> str:
    return request.headers.get(HOLDER_HEADER, "")


def _answer(message: EngineMessage, status: int = 200) -> Response:
    return JSONResponse(message.body(), status_code=status)


def _error(code: EngineCode, message: str) -> Response:
    return JSONResponse(
        EngineRefusal.of(code, message).body(), status_code=code.status, headers={REFUSAL_HEADER: code.value}
    )
