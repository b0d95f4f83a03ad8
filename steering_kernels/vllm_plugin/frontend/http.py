"""The engine's own HTTP routes for the gateway: plans, attestation, self-test, receipts."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from argparse import Namespace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from interpretops.engine_api import HOLDER_HEADER, PREFIX, REFUSAL_HEADER, STATUS, EngineCode
from steering_kernels.vllm_plugin.core.holders import Holders
from steering_kernels.vllm_plugin.core.refusals import refusal_body
from steering_kernels.vllm_plugin.frontend.answer_receipt import AnswerReceipt
from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS
from steering_kernels.vllm_plugin.frontend.special_tokens import describe_special_tokens
from steering_kernels.vllm_plugin.worker.self_test import run_self_test

MAX_PLAN_BYTES = 64 * 1024 * 1024


def make_plugin() -> SteeringEndpoints:
    """Entry point `vllm.endpoint_plugins`."""
    return SteeringEndpoints()


class EngineCores:
    """Calls to every engine core behind this front end."""

    def __init__(self, engine_client: Any) -> None:
        self._client = engine_client

    async def call(self, method: str, *args: Any) -> list[dict[str, Any]]:
        """One answer from each core: the client's own call would return only the first one's."""
        core = self._client.engine_core
        return list(await core.call_utility_all_async(method, *args))


class SteeringEndpoints:
    """vLLM's endpoint plugin protocol."""

    name = "interpretops"
    required_tasks = None

    def __init__(self) -> None:
        self.boot_id = secrets.token_hex(8)
        """Another one after every start, so that the gateway notices an engine that has lost its plans."""
        self._client: Any = None
        self._special_tokens: dict[str, Any] | None = None
        self._holders = Holders()
        self._changing = asyncio.Lock()
        """Held while plans come and go: a gateway lets go of one in the moment in which another loads it."""
        self._testing = asyncio.Lock()
        """Held during a self-test: two of them would take the probe plans from each other."""

    def attach_router(self, app: FastAPI) -> None:
        """Register the routes."""
        app.put(PREFIX + "/plans/{revision}")(self.put_plan)
        app.delete(PREFIX + "/plans/{revision}")(self.delete_plan)
        app.get(PREFIX + "/attest")(self.attest)
        app.post(PREFIX + "/selftest")(self.self_test)
        app.get(PREFIX + "/receipts/{nonce}")(self.receipt)
        app.add_middleware(AnswerReceipt)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """vLLM hands over the engine client."""
        self._client = engine_client

    async def put_plan(self, revision: str, request: Request) -> Response:
        """Make a plan resident on every rank of every engine core; all of them must hold its very numbers."""
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
        answers = await cores.call("interpretops_load", base64.b64encode(data).decode())
        for answer in answers:
            if "error" in answer:
                if self._holders.let_go(holder, revision):
                    await cores.call("interpretops_retire", revision)
                return _error(EngineCode.of(answer["code"]), answer["error"])
        self._holders.hear(holder)
        self._holders.hold(holder, revision)
        ranks = [rank for answer in answers for rank in answer["ranks"]]
        return JSONResponse({"revision": revision, "ranks": ranks})

    async def delete_plan(self, revision: str, request: Request) -> Response:
        """Retire a revision, unless another gateway holds it."""
        async with self._changing:
            in_flight = 0
            if self._holders.let_go(_holder(request), revision):
                in_flight = await self._retire(revision)
        return JSONResponse({"revision": revision, "in_flight": in_flight})

    async def _retire(self, revision: str) -> int:
        answers = await EngineCores(self._client).call("interpretops_retire", revision)
        return sum(int(answer["in_flight"]) for answer in answers)

    async def attest(self, request: Request) -> Response:
        """What every rank of every engine core holds. What no living gateway holds is retired before."""
        async with self._changing:
            self._holders.hear(_holder(request))
            for revision in self._holders.orphans():
                await self._retire(revision)
        return JSONResponse(await self._attest())

    async def self_test(self) -> Response:
        """Prove through the running model that edits act, on every rank."""
        async with self._testing:
            failure = await run_self_test(self._client, EngineCores(self._client), await self._attest())
        if failure is not None:
            return JSONResponse({"ok": False, "reason": failure}, status_code=503)
        return JSONResponse({"ok": True})

    async def receipt(self, nonce: str) -> Response:
        """The receipt of an answer that did not carry it; it can be had once."""
        receipt = RECEIPTS.take(nonce)
        if receipt is None:
            return _error(EngineCode.UNKNOWN_NONCE, "no receipt for this nonce")
        return JSONResponse(receipt)

    async def _attest(self) -> dict[str, Any]:
        import vllm

        from interpretops import __version__

        answers = await EngineCores(self._client).call("interpretops_attest")
        if self._special_tokens is None:
            self._special_tokens = describe_special_tokens(self._client.tokenizer)
        return {
            "plugin_version": __version__,
            "vllm_version": vllm.__version__,
            "boot_id": self.boot_id,
            "model": answers[0]["ranks"][0]["model"],
            "points": answers[0]["ranks"][0]["points"],
            "special_tokens": self._special_tokens,
            "passthrough": all(answer["pass_through"] for answer in answers),
            "engines": [{"resident": answer["resident"], "ranks": answer["ranks"]} for answer in answers],
        }


def _holder(request: Request) -> str:
    return request.headers.get(HOLDER_HEADER, "")


def _error(code: EngineCode, message: str) -> JSONResponse:
    return JSONResponse(
        refusal_body(code, message), status_code=STATUS[code], headers={REFUSAL_HEADER: code.value}
    )
