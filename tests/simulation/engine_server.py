"""The engine model's HTTP server: its routes, its streams, and faults in its answers."""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass, field
from typing import Any

import httptools

from interpretops.engine_api import (
    ATTEST_ROUTE,
    HOLDER_HEADER,
    NONCE_HEADER,
    NONCE_KEY,
    PASS_THROUGH,
    RECEIPT_HEADER,
    REFUSAL_HEADER,
    REVISION_KEY,
    SELF_TEST_ROUTE,
    EngineCode,
    EngineMessage,
    EngineRefusal,
    Receipt,
    SelfTest,
    plan_path,
    receipt_event,
    receipt_path,
)
from simulation.engine import MODEL, PROMPT_TOKENS, EngineModel, Generation, refuse
from simulation.events import Events
from simulation.network import Endpoint

_MARK = re.compile(rb"ask(\d+)\.")
WRONGS = (
    *("dies", "hangs", "late", "twice", "other_revision", "old_receipt", "no_receipt", "nothing_evaluated"),
    *("part", "no_end", "error_event", "busy", "broken", "garbage", "unsteered", "few_tokens", "unfinished"),
)
"""Faults that an answer can have."""
_END = {
    "/v1/responses": b'event: response.completed\ndata: {"type": "response.completed"}\n\n',
    "/v1/messages": b'event: message_stop\ndata: {"type": "message_stop"}\n\n',
}


@dataclass
class _Request:
    method: str = ""
    path: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class EngineServer(asyncio.Protocol):
    """One connection to an engine."""

    def __init__(self, engine: EngineModel, events: Events, wrongs: dict[str, float]) -> None:
        if not engine.listening:
            raise ConnectionRefusedError("the engine is down")
        self.boot_id = engine.boot_id
        self.engine = self._engine = engine
        self._events = events
        self._wrongs = wrongs
        """Probability of each fault."""
        self._parser = httptools.HttpRequestParser(self)
        self._request = _Request()
        self._task: asyncio.Task[None] | None = None
        self._transport: Endpoint
        events.engine_connections.append(self)

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.peer.sends = self._sent

    def connection_lost(self, exc: Exception | None) -> None:
        if self._task is not None:
            self._task.cancel()
        if self in self._events.engine_connections:
            self._events.engine_connections.remove(self)

    def cut(self) -> None:
        """Kill the process."""
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def _sent(self, data: bytes) -> None:
        """Receive data from the gateway, which may be incomplete."""
        mark = _MARK.search(data)
        if mark is not None:
            self._events.sent(mark[1].decode())

    def on_url(self, url: bytes) -> None:
        # In pieces if it arrived in pieces.
        self._request.path += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._request.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._request.body += body

    def on_message_complete(self) -> None:
        request, self._request = self._request, _Request()
        request.method = self._parser.get_method().decode()
        self._task = asyncio.get_running_loop().create_task(self._handle(request))

    async def _handle(self, request: _Request) -> None:
        if self._engine.hangs:
            await asyncio.Event().wait()
        path, holder = request.path, request.headers.get(HOLDER_HEADER, "")
        last = path.rpartition("/")[2]
        if path == "/health":
            self._send(503 if self._engine.sick else 200, {})
        elif path == "/v1/models":
            self._send(200, {"data": [{"id": MODEL, "max_model_len": 64}]})
        elif path == ATTEST_ROUTE:
            self._send(200, self._engine.attest(holder))
        elif path == SELF_TEST_ROUTE:
            steers = self._engine.steers
            self._send(200 if steers else 503, SelfTest(ok=steers, reason="" if steers else "no change"))
        elif path == plan_path(last) and request.method == "PUT":
            self._send(*self._engine.load(holder, last, request.body))
        elif path == plan_path(last):
            self._send(*self._engine.retire(holder, last))
        elif path == receipt_path(last):
            receipt = self._engine.receipts.pop(last, None)
            self._send(*(refuse(EngineCode.UNKNOWN_NONCE) if receipt is None else (200, receipt)))
        elif path in ("/tokenize", "/detokenize", "/v1/messages/count_tokens"):
            self._send(200, {"count": PROMPT_TOKENS})
        else:
            await self._generate(request)

    async def _generate(self, request: _Request) -> None:
        engine, chance = self._engine, self._engine.chance
        body = json.loads(request.body)
        sealed = body["vllm_xargs"][REVISION_KEY]
        wrong = next((name for name in WRONGS if chance.random() < self._wrongs.get(name, 0.0)), "")
        if not engine.admits(sealed):
            mark = _MARK.search(request.body)
            self._events.not_resident(
                "" if mark is None else mark[1].decode(), lambda: self._transport.peer.gone
            )
            self._send(*refuse(EngineCode.NOT_RESIDENT))
            return
        if wrong in ("busy", "broken"):
            self._send(503 if wrong == "busy" else 500, {"error": {"message": wrong, "code": wrong}})
            return
        mark = _MARK.search(request.body)
        prompt = body.get("prompt")
        asked = [body.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
        most = next((value for value in asked if value), 16)
        generation = engine.begin(
            None if mark is None else mark[1].decode(),
            sealed,
            body["vllm_xargs"][NONCE_KEY],
            len(prompt) if isinstance(prompt, list) else 1,
            body.get("n") or 1,
            chance.randint(1, most),
        )
        generation.given_up = lambda: self._transport.peer.gone
        self._events.began(generation)
        try:
            await self._answer(request, generation, body, wrong)
        finally:
            engine.end(generation)
            self._events.ended(generation)

    async def _answer(
        self, request: _Request, generation: Generation, body: dict[str, Any], wrong: str
    ) -> None:
        chance, streamed = self._engine.chance, body.get("stream") is True
        if wrong == "unsteered":
            generation.applied = PASS_THROUGH
        receipt: Receipt | None = generation.receipt()
        assert receipt is not None
        match wrong:
            case "other_revision":
                receipt = receipt.model_copy(update={"revision": "a" * 64})
            case "old_receipt":
                old = [old for old in self._engine.old_receipts if old.revision != generation.sealed]
                receipt = old[-1] if old else None
            case "no_receipt" | "garbage":
                receipt = None
            case "nothing_evaluated":
                receipt = receipt.model_copy(update={"tokens_evaluated": 0, "edits_applied": 0})
            case "part":
                receipt = receipt.model_copy(update={"requests": receipt.requests - 1})
            case "few_tokens":
                receipt = receipt.model_copy(update={"tokens_evaluated": 1})
            case "unfinished":
                receipt = receipt.model_copy(update={"finished": False})
        generation.proven = receipt is not None and _proves(receipt, generation, streamed=streamed)
        generation.told_true = receipt == generation.receipt()
        if receipt is not None:
            self._engine.receipts[generation.nonce] = receipt
        await asyncio.sleep(chance.choice((0.001, 0.02, 0.1, 1.0)))
        if wrong == "late":
            await asyncio.sleep(chance.choice((3.0, 40.0, 700.0)))
        if wrong == "hangs":
            await asyncio.Event().wait()
        if wrong == "garbage":
            self._write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n" + b"x" * 5 + b"HTTP/9 what\r\n\r\n")
            return
        if streamed:
            await self._stream(request, generation, wrong)
        else:
            self._whole(request, generation, wrong)

    def _whole(self, request: _Request, generation: Generation, wrong: str) -> None:
        answer = {**_whole_body(request.path, generation), "model": MODEL}
        if wrong == "dies":
            self._write(b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n" + json.dumps(answer).encode())
            self.cut()
            return
        carried = self._carried(request)
        generation.whole = True
        self._send(200, answer, carried)
        if wrong == "twice":
            self._send(200, answer, carried)

    async def _stream(self, request: _Request, generation: Generation, wrong: str) -> None:
        chance = self._engine.chance
        self._write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        pieces = min(generation.written, 6)
        for piece in range(pieces):
            if wrong == "dies" and piece >= pieces // 2:
                self.cut()
                return
            self._chunk(
                _event(request.path, {"id": "x", "n": piece, "text": f"{generation.mark} [DONE] error"})
            )
            await asyncio.sleep(chance.choice((0.0, 0.005, 0.05, 0.5)))
        if wrong == "error_event":
            self._chunk(b'data: {"error": {"message": "engine core died"}}\n\n')
            generation.proven = False
        generation.whole = True
        if wrong == "no_end":
            generation.proven = False
        else:
            self._chunk(_END.get(request.path, b"data: [DONE]\n\n"))
        if carried := self._carried(request):
            self._chunk(receipt_event(carried))
        self._write(b"0\r\n\r\n")
        if wrong == "twice":
            self._send(200, {"choices": [], "text": generation.mark})

    def _carried(self, request: _Request) -> str:
        """The receipt sent along with an answer; an older plugin keeps it until it is fetched."""
        if self._engine.chance.random() < 0.1:
            return ""
        receipt = self._engine.receipts.pop(request.headers.get(NONCE_HEADER, ""), None)
        return "" if receipt is None else receipt.line()

    def _send(self, status: int, body: dict[str, Any] | EngineMessage, receipt: str = "") -> None:
        data = json.dumps(body.body() if isinstance(body, EngineMessage) else body).encode()
        carried = f"{RECEIPT_HEADER}: {receipt}\r\n" if receipt else ""
        if isinstance(body, EngineRefusal):
            carried += f"{REFUSAL_HEADER}: {body.code}\r\n"
        kind = f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        self._write(f"HTTP/1.1 {status} X\r\n{kind}{carried}\r\n".encode() + data)

    def _chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%b\r\n" % (len(data), data))

    def _write(self, data: bytes) -> None:
        self._transport.write(data)


def _whole_body(path: str, generation: Generation) -> dict[str, Any]:
    number, written = generation.answers, generation.written
    text = f"{generation.mark} text"
    read, wrote = generation.prompts * PROMPT_TOKENS, number * written
    if path == "/v1/messages":
        usage = {"input_tokens": read, "output_tokens": wrote}
        return {"id": "x", "content": [{"type": "text", "text": text}], "usage": usage}
    if path == "/v1/responses":
        usage = {"input_tokens": read, "output_tokens": wrote, "total_tokens": read + wrote}
        return {"id": "x", "output": [{"content": [{"text": text}]}], "usage": usage}
    usage = {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}
    choice = {"text": text, "message": {"role": "assistant", "content": text}}
    return {"id": "x", "choices": [choice] * number, "usage": usage}


def _event(path: str, data: dict[str, Any]) -> bytes:
    name = b"event: piece\n" if path in _END else b""
    return name + b"data: " + json.dumps(data).encode() + b"\n\n"


def _proves(receipt: Receipt, generation: Generation, *, streamed: bool) -> bool:
    """Whether a receipt claims that the required revision was applied to the whole request.

    Unstreamed answers report their tokens, these streams do not.
    """
    least = generation.answers if streamed else generation.tokens
    return bool(
        receipt.revision == generation.sealed
        and receipt.requests == generation.answers
        and receipt.finished
        and (receipt.tokens_evaluated >= least or (streamed and generation.sealed == PASS_THROUGH))
    )
