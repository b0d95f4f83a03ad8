"""Lets a receipt travel with the answer that it is of, so that the gateway need not ask for it."""

from __future__ import annotations

import json
from typing import Any, Final

from steering_kernels.vllm_plugin.receipts import RECEIPTS

NONCE_HEADER: Final = b"x-interpretops-nonce"
RECEIPT_HEADER: Final = b"x-interpretops-receipt"


class AnswerReceipt:
    """ASGI middleware: for requests that carry their nonce as a header, too.

    A whole answer gets the receipt as a header and is held back until it is whole; a stream of events gets it
    as its last event, a comment. Both are known by then: reports leave the core with the outputs they are of.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request."""
        nonce = _header(scope, NONCE_HEADER) if scope["type"] == "http" else None
        if nonce is None:
            await self._app(scope, receive, send)
            return
        held: dict[str, Any] | None = None
        parts: list[bytes] = []
        streamed = False

        async def send_with_receipt(message: Any) -> None:
            nonlocal held, streamed
            if message["type"] == "http.response.start":
                streamed = (_header(message, b"content-type") or "").startswith("text/event-stream")
                if streamed or message["status"] != 200:
                    await send(message)
                else:
                    held = message
                return
            if message["type"] != "http.response.body" or not (streamed or held):
                await send(message)
                return
            if held is not None:
                parts.append(message.get("body", b""))
            if message.get("more_body"):
                if held is None:
                    await send(message)
                return
            receipt = RECEIPTS.take(nonce)
            told = b"" if receipt is None else json.dumps(receipt, separators=(",", ":")).encode()
            if held is None:
                comment = b": interpretops-receipt " + told + b"\n\n" if told else b""
                await send({**message, "body": message.get("body", b"") + comment})
                return
            if told:
                held["headers"] = [*held.get("headers", ()), (RECEIPT_HEADER, told)]
            await send(held)
            await send({"type": "http.response.body", "body": b"".join(parts)})

        await self._app(scope, receive, send_with_receipt)


def _header(message: Any, name: bytes) -> str | None:
    """A header of a scope or a start of an answer."""
    for key, value in message.get("headers", ()):
        if key.lower() == name:
            return str(value.decode("latin-1"))
    return None
