"""Sends a request to the engine under its revision, and its answer back once a receipt proves it."""

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

from interpretops.engine_api import NONCE_HEADER, NONCE_KEY, REVISION_KEY, EngineCode, Receipt
from interpretops.engine_api import RECEIPT_HEADER as ENGINE_RECEIPT
from interpretops.errors import EngineError
from proxy.engines.fleet import Turn
from proxy.engines.http_connection import (
    Answer,
    AnswerTooLargeError,
    EngineGivenUpError,
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
from proxy.observe.request_context import Trail
from proxy.openai_api.headers import POLICY_HEADER, PROCESSING_HEADER, RECEIPT_HEADER, REQUEST_ID_HEADER
from proxy.openai_api.request_body import serialize
from proxy.openai_api.request_size import Size
from proxy.openai_api.routes import Route
from proxy.openai_api.sse import SseOverflowError, SseSplitter, comment, error_event
from proxy.policies.binding import NONE
from proxy.policies.policy_files import Revision
from proxy.state import Gateway
from proxy.verification.receipt_proof import Told, fault, told_by, told_by_stream

"""Milliseconds until the answer was there; of a stream, until it began."""
_GONE = (OSError, TimeoutError)
_MOST_ERROR: Final = 1024 * 1024
"""Longest error of the engine that is read; vLLM quotes what it finds wrong."""
_MOST_COMPARED: Final = 1024 * 1024
"""Longest answer that is kept until a shadow has answered too."""


@dataclass(frozen=True)
class Demand:
    """One request, ready to be sent: what it asks, and the revision that must steer it."""

    gateway: Gateway
    turn: Turn
    route: Route
    body: Mapping[str, Any]
    revision: Revision | None
    trail: Trail
    size: Size = Size()  # noqa: RUF009 (frozen)
    """Of `body`: how many engine requests the receipt must cover."""

    @property
    def revision_id(self) -> str:
        """64 hex, or `none`."""
        return NONE if self.revision is None else self.revision.revision

    @property
    def headers(self) -> dict[str, str]:
        """Headers that every answer carries."""
        label = NONE if self.revision is None else self.revision.label
        return {**self.trail.headers, POLICY_HEADER: label, REQUEST_ID_HEADER: self.trail.request_id}


async def relay(request: web.Request, demand: Demand) -> web.StreamResponse:
    """Answer one request. Raises `Refusal` as long as nothing has been sent to the client."""
    nonce = demand.trail.nonce = secrets.token_hex(16)
    sealed = {REVISION_KEY: demand.revision_id, NONCE_KEY: nonce}
    payload = serialize({**demand.body, "vllm_xargs": sealed})
    streamed = demand.body.get("stream") is True
    sent_at = time.perf_counter()
    upstream = await _send(demand, payload, streamed=streamed)
    try:
        if upstream.status != 200:
            raise await _engine_refusal(upstream)
        await _check_engine(demand)
        if streamed:
            return await _relay_stream(request, demand, upstream, sent_at)
        return await _relay_whole(demand, upstream, sent_at)
    finally:
        # Also when the client is gone or we were cancelled: the engine stops generating when this closes.
        upstream.close()


async def relay_plain(demand: Demand) -> web.StreamResponse:
    """Answer a request for which no model runs, so that there is nothing to steer and nothing to prove."""
    sent_at = time.perf_counter()
    upstream = await _send(demand, serialize(demand.body), streamed=False)
    try:
        if upstream.status != 200:
            raise await _engine_refusal(upstream)
        await _check_engine(demand)
        answer = await _read_whole(demand, upstream)
    except _GONE as error:
        raise _engine_gone(demand, error) from error
    finally:
        upstream.close()
    demand.turn.link.breaker.worked()
    demand.trail.engine_s = time.perf_counter() - sent_at
    headers = {**demand.trail.headers, REQUEST_ID_HEADER: demand.trail.request_id}
    return web.Response(body=answer, content_type="application/json", headers=headers)


async def _send(demand: Demand, payload: bytes, *, streamed: bool) -> Answer:
    """The engine's answer, of which nothing is read yet.

    Another engine is asked where one cannot be reached, or says that it takes no requests now: there nothing
    has begun, so that nothing can happen twice.
    """
    settings, turn, nonce = demand.gateway.settings.gateway, demand.turn, demand.trail.nonce
    named = {} if nonce is None else {NONCE_HEADER: nonce}
    ends_at = time.monotonic() + settings.request_timeout_s
    while True:
        try:
            upstream = await turn.engine.client.generate(
                demand.route.path,
                payload,
                total_timeout_s=max(0.001, ends_at - time.monotonic()),
                idle_timeout_s=settings.stream_idle_timeout_s if streamed else None,
                headers={**named, **demand.trail.engine_headers},
            )
        except _GONE as error:
            refusal = _engine_gone(demand, error)
            if isinstance(refusal, EngineNotReady) and turn.again("unreached"):
                continue
            raise refusal from error
        refused = refusal_code(upstream)
        if refused is EngineCode.NOT_RESIDENT:
            # Nothing is wrong with the engine but that it lost a plan, which is loaded again.
            turn.engine.miss(demand.revision_id)
            if turn.again("not_resident"):
                upstream.close()
                continue
        elif upstream.status == 503 and refused is None:
            turn.link.breaker.failed()
            if turn.again("refused"):
                upstream.close()
                continue
        return upstream


async def _relay_whole(demand: Demand, upstream: Answer, sent_at: float) -> web.StreamResponse:
    try:
        answer = await _read_whole(demand, upstream)
    except _GONE as error:
        raise _engine_gone(demand, error) from error
    demand.trail.engine_s = time.perf_counter() - sent_at
    try:
        told = await told_by(answer)
    except ValueError:
        raise EngineFailed("the engine did not answer with a JSON object") from None
    receipt = await _proof(demand, upstream.header(ENGINE_RECEIPT), told)
    if demand.trail.keep_answer and len(answer) <= _MOST_COMPARED:
        demand.trail.answer = answer
    if demand.trail.transcript is not None:
        demand.trail.transcript.add(answer)
    headers = {**demand.headers, RECEIPT_HEADER: json.dumps(receipt, separators=(",", ":"))}
    return web.Response(body=answer, content_type="application/json", headers=headers)


async def _read_whole(demand: Demand, upstream: Answer) -> bytes:
    """An answer that must be whole before any of it is sent on, so that it is held: up to a bound."""
    most = demand.gateway.settings.gateway.max_answer_bytes
    try:
        return await upstream.read(most)
    except AnswerTooLargeError:
        if told := upstream.header(ENGINE_RECEIPT):
            # The engine has done the work, and tells of it this once.
            with contextlib.suppress(EngineError):
                demand.trail.take(Receipt.read(told))
        streams = "" if "stream" not in demand.route.fields else ", or stream it"
        raise AnswerTooLarge(
            f"the answer exceeds the {most} bytes that are held of one (gateway.max_answer_bytes); ask for "
            f"fewer answers, tokens or log-probabilities{streams}"
        ) from None


async def _relay_stream(
    request: web.Request, demand: Demand, upstream: Answer, sent_at: float
) -> web.StreamResponse:
    if upstream.content_type != "text/event-stream":
        raise EngineFailed("the engine did not answer with an event stream")
    trail = demand.trail
    taken = round((time.perf_counter() - trail.began_at) * 1e3)
    response = web.StreamResponse(
        headers={
            **demand.headers,
            PROCESSING_HEADER: str(taken),
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )
    response.content_type = "text/event-stream"
    response.charset = "utf-8"
    splitter = SseSplitter(demand.route.end)
    await response.prepare(request)
    itl = demand.gateway.metrics.itl.labels(trail.policy)
    last = trail.began_at
    try:
        while chunk := await upstream.next():
            if events := splitter.feed(chunk):
                now = time.perf_counter()
                if trail.ttft_s is None:
                    trail.ttft_s = now - trail.began_at
                else:
                    itl.observe(now - last)
                last = now
                await response.write(events)
                if trail.transcript is not None:
                    trail.transcript.add(events)
        trail.engine_s = time.perf_counter() - sent_at
        if splitter.failed:
            trail.reason = EngineFailed.code
            if splitter.receipt:
                with contextlib.suppress(EngineError):
                    trail.take(Receipt.read(splitter.receipt))
            await response.write_eof()
            return response
        if not splitter.end_event:
            raise EngineFailed("the engine ended the stream too early; the answer is incomplete")
        try:
            told = told_by_stream(splitter, named=demand.route.named_events)
        except ValueError:
            raise EngineFailed("the engine sent an event that is no JSON object") from None
        receipt = await _proof(demand, splitter.receipt, told)
    except Refusal as refusal:
        return await _break_off(response, demand, refusal)
    except SseOverflowError:
        return await _break_off(response, demand, EngineFailed("the engine sent an event without end"))
    except aiohttp.ClientConnectionResetError:
        # Writing to the client failed; the engine's failures are the other kinds.
        raise
    except _GONE as error:
        return await _break_off(response, demand, _engine_gone(demand, error))
    await response.write(comment("steering-receipt", receipt) + splitter.end_event)
    await response.write_eof()
    return response


async def _break_off(response: web.StreamResponse, demand: Demand, refusal: Refusal) -> web.StreamResponse:
    """End a stream that has begun: an error event, and no end marker, lest a client take it for whole."""
    demand.trail.reason = refusal.code
    body = error_body(refusal.status, refusal.code, str(refusal))
    await response.write(error_event(body, named=demand.route.named_events))
    await response.write_eof()
    return response


async def _proof(demand: Demand, came: bytes, told: Told) -> dict[str, Any]:
    """The receipt of the answer just read, as callers see it; raises when it does not prove the answer.

    ``came`` is what came with the answer; an engine with an older plugin is asked for it.
    """
    why: str | None
    receipt: Receipt | None = None
    try:
        client, nonce = demand.turn.engine.client, demand.trail.nonce or ""
        receipt = Receipt.read(came) if came else await client.receipt(nonce)
        if receipt is not None:
            demand.trail.take(receipt)
        why = fault(receipt, demand.revision_id, demand.size, told)
    except EngineError as error:
        why = str(error)
    if receipt is None or why is not None:
        demand.gateway.metrics.receipts_failed.labels(demand.trail.policy).inc()
        demand.gateway.log.error(
            "receipt_failed", request_id=demand.trail.request_id, demanded=demand.revision_id, why=why
        )
        raise ReceiptFailed(
            "the engine did not prove that the demanded policy was applied; the answer is withheld"
        )
    demand.turn.link.breaker.worked()
    return {
        "policy": demand.trail.policy,
        **receipt.model_dump(exclude={"finished"}),
    }


async def _check_engine(demand: Demand) -> None:
    try:
        await demand.turn.engine.check_connections()
    except EngineError as error:
        demand.turn.link.lose(str(error))
        raise EngineNotReady(
            "the engine was restarted and is not proven yet; try again in a moment"
        ) from error


async def _engine_refusal(upstream: Answer) -> Refusal:
    """The engine's own error, in OpenAI's shape; its inner failures without their text."""
    refused = refusal_code(upstream)
    if refused is EngineCode.NOT_RESIDENT:
        return PolicyUnavailable("the engine does not hold the demanded policy at the moment; try again")
    if refused is EngineCode.POLICY_DEMANDED:
        return PolicyUnavailable("the engine serves no request without a policy, and none applies here")
    if refused is not None:
        return EngineFailed(f"the engine refused the request: {refused.value}")
    try:
        told = json.loads(await upstream.read(_MOST_ERROR))["error"]
        message, param = str(told["message"]), told.get("param")
    except (*_GONE, AnswerTooLargeError, ValueError, KeyError, TypeError, AttributeError):
        return EngineFailed(f"the engine answered with status {upstream.status}")
    if upstream.status in (400, 413, 422):
        return InvalidRequest(message, param=None if param is None else str(param))
    if upstream.status == 404:
        return UnknownModel(message, param="model")
    return EngineFailed(f"the engine failed with status {upstream.status}")


def _engine_gone(demand: Demand, error: BaseException) -> Refusal:
    """What the caller is told; the engine is blamed for all but an answer that took too long."""
    if not isinstance(error, TimeoutError | EngineGivenUpError):
        demand.turn.link.breaker.failed()
    if isinstance(error, EngineUnreachableError):
        return EngineNotReady("the engine cannot be reached; try again in a moment")
    if isinstance(error, TimeoutError):
        return EngineTimeout("the engine did not answer in time")
    return EngineFailed("the engine went away while it answered; the answer is incomplete")
