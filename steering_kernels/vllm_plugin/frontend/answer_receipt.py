"""Sends the receipt along with its answer, and plugin refusals with their error code."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, Final

from interpretops.engine_api import NONCE_HEADER, RECEIPT_HEADER, EngineCode, receipt_event
from steering_kernels.vllm_plugin.core.refusals import REFUSALS, refusal_answer
from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS
from steering_kernels.vllm_plugin.frontend.refused_answers import refused_answer
from steering_kernels.vllm_plugin.frontend.refused_streams import REFUSED_STREAMS

_NONCE: Final = NONCE_HEADER.encode()
_RECEIPT: Final = RECEIPT_HEADER.encode()


class AnswerReceipt:
    """ASGI middleware for requests that also carry their nonce as a header.

    An answer that is not streamed is buffered and gets the receipt as a header. A stream gets it as its last
    event, a comment. The receipt is complete by then: reports leave the core together with their outputs.

    A stream is held back until the engine's first output. So a refused request gets a proper response whose
    `error.code` and header give the reason; vLLM would send "Internal server error" or, on some routes, break
    off after the first events.

    What a refusal gate stopped is written in the form in which the route's API tells a refusal.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handle one request."""
        nonce = _header(scope, _NONCE) if scope["type"] == "http" else None
        if nonce is None:
            await self._app(scope, receive, send)
            return
        answer = _Answer(nonce, send, scope["path"])
        try:
            await self._app(scope, receive, answer)
        except Exception:
            if not await answer.refuse_late():
                raise


class _Answer:
    """Relays the ASGI messages of one answer."""

    def __init__(self, nonce: str, send: Any, path: str) -> None:
        self._nonce = nonce
        self._send = send
        self._path = path
        make = REFUSED_STREAMS.get(path)
        self._stopped = None if make is None else make(nonce)
        """Writes what is left of a stream that a refusal gate stopped; None on a route without refusals."""
        self._start: Any = None
        """The start message while it is held back; otherwise None."""
        self._parts: list[bytes] = []
        self._early: list[Any] = []
        """Events received before the engine's first output."""
        self._begun = False
        self._streamed = self._refused = False

    async def __call__(self, message: Any) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self._start = message
            self._streamed = (_header(message, b"content-type") or "").startswith("text/event-stream")
        elif message["type"] != "http.response.body":
            await self._send(message)
        elif self._streamed:
            await self._send_event(message)
        else:
            self._parts.append(message.get("body", b""))
            if not message.get("more_body"):
                await self._send_whole()

    async def refuse_late(self) -> bool:
        """After the app raised: send the refusal, if there is one. Returns whether it was sent."""
        return not self._begun and await self._refuse(REFUSALS.take(self._nonce))

    async def _send_event(self, message: Any) -> None:
        if self._start is not None:
            if await self._refuse(REFUSALS.take(self._nonce)):
                return
            if message.get("more_body") and not RECEIPTS.knows(self._nonce):
                self._early.append(message)
                return
            self._begun = True
            early, self._early = self._early, []
            await self._send(self._start)
            self._start = None
            for part in early:
                await self._send({**part, "body": self._shown(part.get("body", b""))})
        message = {**message, "body": self._shown(message.get("body", b""), RECEIPTS.refusal(self._nonce))}
        if not message.get("more_body") and (receipt := self._receipt()):
            message["body"] += receipt_event(receipt)
        await self._send(message)

    def _shown(self, body: bytes, refusal: str | None = None) -> bytes:
        """The events of a stream, rewritten if a refusal gate stopped a request with this text.

        Raises ValueError or LookupError, which ends the connection, for events that cannot be rewritten.
        """
        events = [part + b"\n\n" for part in body.split(b"\n\n") if part]
        if refusal is None:
            if self._stopped is not None:
                for event in events:
                    self._stopped.note(event)
            return body
        if self._stopped is None:
            raise LookupError(f"{self._path} has no form for a refusal")
        return b"".join(part for event in events for part in self._stopped.rewrite(event, refusal))

    async def _send_whole(self) -> None:
        body, start = b"".join(self._parts), self._start
        if start["status"] != 200:
            if await self._refuse(REFUSALS.take(self._nonce) or _invalid_seal(start["status"], body)):
                return
        else:
            text = RECEIPTS.refusal(self._nonce)
            if text is not None:
                refused = refused_answer(self._path, body, self._nonce, text)
                if refused is None:
                    await self._refuse((EngineCode.FAILED, f"{self._path} has no form for a refusal"))
                    return
                body, start["headers"] = refused, _sized(start.get("headers", ()), refused)
            if receipt := self._receipt():
                start["headers"] = [*start.get("headers", ()), (_RECEIPT, receipt.encode())]
        self._begun = True
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body})

    async def _refuse(self, refusal: tuple[EngineCode, str] | None) -> bool:
        if refusal is not None:
            self._refused = True
            for message in refusal_answer(*refusal):
                await self._send(message)
        return self._refused

    def _receipt(self) -> str:
        receipt = RECEIPTS.take(self._nonce)
        return "" if receipt is None else receipt.line()


def _invalid_seal(status: int, body: bytes) -> tuple[EngineCode, str] | None:
    """The refusal by our input check (`process_inputs`), recognised by the field that vLLM's error names."""
    if status != 400 or b"vllm_xargs" not in body:
        return None
    try:
        error = json.loads(body)["error"]
        return (EngineCode.INVALID_SEAL, str(error["message"])) if error["param"] == "vllm_xargs" else None
    except (ValueError, KeyError, TypeError):
        return None


def _sized(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> list[tuple[bytes, bytes]]:
    """The headers of a response with the length of another body."""
    kept = [(key, value) for key, value in headers if key.lower() != b"content-length"]
    return [*kept, (b"content-length", str(len(body)).encode())]


def _header(message: Any, name: bytes) -> str | None:
    """A header of an ASGI scope or start message."""
    for key, value in message.get("headers", ()):
        if key.lower() == name:
            return str(value.decode("latin-1"))
    return None
