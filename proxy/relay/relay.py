"""Sends a request to the engine under its revision, and returns the answer once a receipt proves it."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
from aiohttp import web

from interpretops.engine_api import NONCE_HEADER, PASS_THROUGH, EngineCode, Receipt, seal
from interpretops.engine_api import RECEIPT_HEADER as ENGINE_RECEIPT
from interpretops.errors import EngineError
from proxy.engines.fleet import Lease
from proxy.engines.http_connection import (
    Answer,
    AnswerTooLargeError,
    EngineClientClosedError,
    EngineUnreachableError,
    refusal_code,
)
from proxy.errors import (
    AnswerTooLarge,
    EngineFailed,
    EngineNotReady,
    EngineTimeout,
    InvalidRequest,
    PolicyUnavailable,
    ReceiptFailed,
    Refusal,
    UnknownModel,
    error_body,
)
from proxy.observe.request_context import RequestContext
from proxy.openai_api.headers import POLICY_HEADER, PROCESSING_HEADER, RECEIPT_HEADER, REQUEST_ID_HEADER
from proxy.openai_api.request_body import serialize
from proxy.openai_api.request_size import Size
from proxy.openai_api.routes import Route
from proxy.openai_api.sse import SseOverflowError, SseSplitter, comment, error_event
from proxy.policies.binding import NONE
from proxy.policies.policy_files import Revision
from proxy.state import Gateway
from proxy.verification.receipt_proof import AnswerUsage, answer_usage, receipt_fault, stream_usage

_CONNECTION_ERRORS = (OSError, TimeoutError)
_MAX_ERROR: Final = 1024 * 1024
"""Longest engine error that is read; vLLM quotes the offending input."""
_MAX_COMPARED: Final = 1024 * 1024
"""Longest answer that is kept for comparison with a shadow's answer."""


@dataclass(frozen=True)
class EngineCall:
    """One request, ready to send to an engine, and the revision that must steer it."""

    gateway: Gateway
    lease: Lease
    route: Route
    body: Mapping[str, Any]
    revision: Revision | None
    context: RequestContext
    size: Size = Size()  # noqa: RUF009 (frozen)
    """Size of `body`: how many engine requests the receipt must cover."""

    @property
    def revision_id(self) -> str:
        """64 hex, or `none`."""
        return PASS_THROUGH if self.revision is None else self.revision.revision

    @property
    def headers(self) -> dict[str, str]:
        """Headers of every response."""
        label = NONE if self.revision is None else self.revision.label
        return {**self.context.headers, POLICY_HEADER: label, REQUEST_ID_HEADER: self.context.request_id}


async def relay(request: web.Request, call: EngineCall) -> web.StreamResponse:
    """Answer one request. Raises `Refusal` only while nothing has been sent to the client."""
    nonce = call.context.nonce = secrets.token_hex(16)
    payload = serialize({**call.body, "vllm_xargs": seal(call.revision_id, nonce)})
    streamed = call.body.get("stream") is True
    sent_at = time.perf_counter()
    upstream = await _send(call, payload, streamed=streamed)
    try:
        if upstream.status != 200:
            raise await _engine_refusal(upstream)
        await _check_engine(call)
        if streamed:
            return await _relay_stream(request, call, upstream, sent_at)
        return await _relay_whole(call, upstream, sent_at)
    finally:
        # Also after a disconnect or cancellation: closing makes the engine stop generating.
        upstream.close()


async def relay_plain(call: EngineCall) -> web.StreamResponse:
    """Answer a request for which no model runs: there is nothing to steer or prove."""
    sent_at = time.perf_counter()
    upstream = await _send(call, serialize(call.body), streamed=False)
    try:
        if upstream.status != 200:
            raise await _engine_refusal(upstream)
        await _check_engine(call)
        answer = await _read_whole(call, upstream)
    except _CONNECTION_ERRORS as error:
        raise _engine_failure(call, error) from error
    finally:
        upstream.close()
    call.lease.link.breaker.worked()
    call.context.engine_s = time.perf_counter() - sent_at
    headers = {**call.context.headers, REQUEST_ID_HEADER: call.context.request_id}
    return web.Response(body=answer, content_type="application/json", headers=headers)


async def _send(call: EngineCall, payload: bytes, *, streamed: bool) -> Answer:
    """Send the request; returns the engine's response with its body unread.

    Tries another engine when one is unreachable or accepts no requests now. Neither has started any work, so
    nothing runs twice.
    """
    settings, lease, nonce = call.gateway.settings.gateway, call.lease, call.context.nonce
    named = {} if nonce is None else {NONCE_HEADER: nonce}
    ends_at = time.monotonic() + settings.request_timeout_s
    while True:
        try:
            upstream = await lease.engine.client.generate(
                call.route.path,
                payload,
                total_timeout_s=max(0.001, ends_at - time.monotonic()),
                idle_timeout_s=settings.stream_idle_timeout_s if streamed else None,
                headers={**named, **call.context.engine_headers},
            )
        except _CONNECTION_ERRORS as error:
            refusal = _engine_failure(call, error)
            if isinstance(refusal, EngineNotReady) and lease.try_another("unreached"):
                continue
            raise refusal from error
        refused = refusal_code(upstream)
        if refused is EngineCode.NOT_RESIDENT:
            # The engine is healthy but lost a plan; the plan is loaded again.
            lease.engine.mark_missing(call.revision_id)
            if lease.try_another("not_resident"):
                upstream.close()
                continue
        elif upstream.status == 503 and refused is None:
            lease.link.breaker.failed()
            if lease.try_another("refused"):
                upstream.close()
                continue
        return upstream


async def _relay_whole(call: EngineCall, upstream: Answer, sent_at: float) -> web.StreamResponse:
    try:
        answer = await _read_whole(call, upstream)
    except _CONNECTION_ERRORS as error:
        raise _engine_failure(call, error) from error
    call.context.engine_s = time.perf_counter() - sent_at
    try:
        usage = await answer_usage(answer)
    except ValueError:
        raise EngineFailed("the engine's response is not a JSON object") from None
    receipt = await _proof(call, upstream.header(ENGINE_RECEIPT), usage)
    if call.context.keep_answer and len(answer) <= _MAX_COMPARED:
        call.context.answer = answer
    if call.context.transcript is not None:
        call.context.transcript.add(answer)
    headers = {**call.headers, RECEIPT_HEADER: json.dumps(receipt, separators=(",", ":"))}
    return web.Response(body=answer, content_type="application/json", headers=headers)


async def _read_whole(call: EngineCall, upstream: Answer) -> bytes:
    """Buffer an answer that must be proven before any of it is sent, up to `gateway.max_answer_bytes`."""
    most = call.gateway.settings.gateway.max_answer_bytes
    try:
        return await upstream.read(most)
    except AnswerTooLargeError:
        if header := upstream.header(ENGINE_RECEIPT):
            # The engine has done the work, so bill it.
            with contextlib.suppress(EngineError):
                call.context.take(Receipt.read(header))
        streams = "" if "stream" not in call.route.fields else ", or stream it"
        raise AnswerTooLarge(
            f"the answer exceeds the buffer limit of {most} bytes (gateway.max_answer_bytes); ask for "
            f"fewer answers, tokens or log-probabilities{streams}"
        ) from None


async def _relay_stream(
    request: web.Request, call: EngineCall, upstream: Answer, sent_at: float
) -> web.StreamResponse:
    if upstream.content_type != "text/event-stream":
        raise EngineFailed("the engine's response is not an event stream")
    context = call.context
    taken = round((time.perf_counter() - context.began_at) * 1e3)
    response = web.StreamResponse(
        headers={
            **call.headers,
            PROCESSING_HEADER: str(taken),
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )
    response.content_type = "text/event-stream"
    response.charset = "utf-8"
    splitter = SseSplitter(call.route.end)
    await response.prepare(request)
    itl = call.gateway.metrics.itl.labels(context.policy)
    last = context.began_at
    try:
        while chunk := await upstream.next():
            if events := splitter.feed(chunk):
                now = time.perf_counter()
                if context.ttft_s is None:
                    context.ttft_s = now - context.began_at
                else:
                    itl.observe(now - last)
                last = now
                await response.write(events)
                if context.transcript is not None:
                    context.transcript.add(events)
        context.engine_s = time.perf_counter() - sent_at
        if splitter.failed:
            context.reason = EngineFailed.code
            if splitter.receipt:
                with contextlib.suppress(EngineError):
                    context.take(Receipt.read(splitter.receipt))
            await response.write_eof()
            return response
        if not splitter.end_event:
            raise EngineFailed("the engine ended the stream early; the answer is incomplete")
        try:
            usage = stream_usage(splitter, named=call.route.named_events)
        except ValueError:
            raise EngineFailed("the engine sent an event that is not a JSON object") from None
        receipt = await _proof(call, splitter.receipt, usage)
    except Refusal as refusal:
        return await _break_off(response, call, refusal)
    except SseOverflowError:
        return await _break_off(response, call, EngineFailed("the engine sent an event that is too large"))
    except aiohttp.ClientConnectionResetError:
        # Writing to the client failed; all other errors here come from the engine.
        raise
    except _CONNECTION_ERRORS as error:
        return await _break_off(response, call, _engine_failure(call, error))
    await response.write(comment("steering-receipt", receipt) + splitter.end_event)
    await response.write_eof()
    return response


async def _break_off(response: web.StreamResponse, call: EngineCall, refusal: Refusal) -> web.StreamResponse:
    """End a started stream with an error event and no end marker, so that clients see it is incomplete."""
    call.context.reason = refusal.code
    body = error_body(refusal.status, refusal.code, str(refusal))
    await response.write(error_event(body, named=call.route.named_events))
    await response.write_eof()
    return response


async def _proof(call: EngineCall, header: bytes, usage: AnswerUsage) -> dict[str, Any]:
    """The receipt of the answer just read, in the form shown to callers. Raises if it is no proof.

    ``header`` is the receipt sent with the answer. If empty (older plugins), the engine is asked for it.
    """
    why: str | None
    receipt: Receipt | None = None
    try:
        client, nonce = call.lease.engine.client, call.context.nonce or ""
        receipt = Receipt.read(header) if header else await client.receipt(nonce)
        if receipt is not None:
            call.context.take(receipt)
        why = receipt_fault(receipt, call.revision_id, call.size, usage)
    except EngineError as error:
        why = str(error)
    if receipt is None or why is not None:
        call.gateway.metrics.receipts_failed.labels(call.context.policy).inc()
        call.gateway.log.error(
            "receipt_failed", request_id=call.context.request_id, demanded=call.revision_id, why=why
        )
        raise ReceiptFailed(
            "the engine did not prove that the required policy was applied; the answer is withheld"
        )
    call.lease.link.breaker.worked()
    return {
        "policy": call.context.policy,
        **receipt.model_dump(exclude={"finished"}),
    }


async def _check_engine(call: EngineCall) -> None:
    try:
        await call.lease.engine.check_connections()
    except EngineError as error:
        call.lease.link.lose(str(error))
        raise EngineNotReady(
            "the engine was restarted and has not passed its self-test yet; try again in a moment"
        ) from error


async def _engine_refusal(upstream: Answer) -> Refusal:
    """The engine's error in OpenAI's format. The text of its internal errors is not passed on."""
    refused = refusal_code(upstream)
    if refused is EngineCode.NOT_RESIDENT:
        return PolicyUnavailable("the required policy is not loaded in the engine at the moment; try again")
    if refused is EngineCode.POLICY_DEMANDED:
        return PolicyUnavailable("the engine refuses requests without a policy, and none applies here")
    if refused is not None:
        return EngineFailed(f"the engine refused the request: {refused.value}")
    try:
        body = json.loads(await upstream.read(_MAX_ERROR))["error"]
        message, param = str(body["message"]), body.get("param")
    except (*_CONNECTION_ERRORS, AnswerTooLargeError, ValueError, KeyError, TypeError, AttributeError):
        return EngineFailed(f"the engine answered with status {upstream.status}")
    if upstream.status in (400, 413, 422):
        return InvalidRequest(message, param=None if param is None else str(param))
    if upstream.status == 404:
        return UnknownModel(message, param="model")
    return EngineFailed(f"the engine failed with status {upstream.status}")


def _engine_failure(call: EngineCall, error: BaseException) -> Refusal:
    """The error for the caller. All but timeouts and our own shutdown count as failures of the engine."""
    if not isinstance(error, TimeoutError | EngineClientClosedError):
        call.lease.link.breaker.failed()
    if isinstance(error, EngineUnreachableError):
        return EngineNotReady("the engine cannot be reached; try again in a moment")
    if isinstance(error, TimeoutError):
        return EngineTimeout("the engine did not answer in time")
    return EngineFailed("the engine disconnected while answering; the answer is incomplete")
