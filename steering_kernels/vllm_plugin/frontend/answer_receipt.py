"""Lets a receipt travel with the answer that it is of, and a refusal of the plugin's with its code."""

from __future__ import annotations

import json
from typing import Any, Final

from interpretops.engine_api import NONCE_HEADER, RECEIPT_HEADER, EngineCode, receipt_event
from steering_kernels.vllm_plugin.core.refusals import REFUSALS, refusal_answer
from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS

_NONCE: Final = NONCE_HEADER.encode()
_RECEIPT: Final = RECEIPT_HEADER.encode()


class AnswerReceipt:
    """ASGI middleware: for requests that carry their nonce as a header, too.

    A whole answer gets the receipt as a header and is held back until it is whole; a stream of events gets it
    as its last event, a comment. Both are known by then: reports leave the core with the outputs they are of.

    A stream begins when the engine has answered for the first time, be it with a token, so that a request
    which it refuses gets an answer of its own: `error.code` and a header say why, where vLLM would say
    "Internal server error" or, on some routes, break off after its first events.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        nonce = _header(scope, _NONCE) if scope["type"] == "http" else None
        if nonce is None:
            await self._app(scope, receive, send)
            return
        answer = _Answer(nonce, send)
        try:
            await self._app(scope, receive, answer)
        except Exception:
            if not await answer.refuse_late():
                raise


class _Answer:
    """The messages of one answer, on their way."""

    def __init__(self, nonce: str, send: Any) -> None:
        self._nonce = nonce
        self._send = send
        self._start: Any = None
        """Held back; None before it came and after it was sent."""
        self._parts: list[bytes] = []
        self._early: list[Any] = []
        """Events of before the engine's first answer."""
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
        """The app failed: whether that was a refusal, which has been sent now."""
        return not self._begun and await self._refuse(REFUSALS.take(self._nonce))

    async def _send_event(self, message: Any) -> None:
        if self._start is not None:
            if await self._refuse(REFUSALS.take(self._nonce)):
                return
            if message.get("more_body") and not RECEIPTS.knows(self._nonce):
                self._early.append(message)
                return
            self._begun = True
            for early in (self._start, *self._early):
                await self._send(early)
            self._start, self._early = None, []
        if not message.get("more_body") and (told := self._receipt()):
            message = {
                **message,
                "body": message.get("body", b"") + receipt_event(told),
            }
        await self._send(message)

    async def _send_whole(self) -> None:
        body, start = b"".join(self._parts), self._start
        if start["status"] != 200:
            if await self._refuse(REFUSALS.take(self._nonce) or _unsealed(start["status"], body)):
                return
        elif told := self._receipt():
            start["headers"] = [*start.get("headers", ()), (_RECEIPT, told.encode())]
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


def _unsealed(status: int, body: bytes) -> tuple[EngineCode, str] | None:
    """The refusal of a front end that found no valid arguments of ours; vLLM lets an error name one field."""
    if status != 400 or b"vllm_xargs" not in body:
        return None
    try:
        error = json.loads(body)["error"]
        return (EngineCode.INVALID_SEAL, str(error["message"])) if error["param"] == "vllm_xargs" else None
    except (ValueError, KeyError, TypeError):
        return None


def _header(message: Any, name: bytes) -> str | None:
    """A header of a scope or a start of an answer."""
    for key, value in message.get("headers", ()):
        if key.lower() == name:
            return str(value.decode("latin-1"))
    return None
