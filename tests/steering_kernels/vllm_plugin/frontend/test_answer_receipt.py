"""A receipt is sent along with its answer, through the same web framework as vLLM's."""

import json
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse

from interpretops.engine_api import EngineCode
from steering_kernels.vllm_plugin.core.refusals import REFUSALS
from steering_kernels.vllm_plugin.frontend.answer_receipt import AnswerReceipt
from steering_kernels.vllm_plugin.frontend.receipts import RECEIPTS, collect, mark_ended
from steering_kernels.vllm_plugin.worker.report import OUTPUT_KEY, Report

NONCE = "ab" * 16


@pytest.fixture
def app() -> Iterator[FastAPI]:
    app = FastAPI()
    app.add_middleware(AnswerReceipt)

    @app.post("/whole")
    async def whole() -> JSONResponse:
        return JSONResponse({"text": "hello"})

    @app.post("/pieces")
    async def pieces() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b'{"text":'
            yield b'"hello"}'

        return StreamingResponse(parts(), media_type="application/json")

    @app.post("/stream")
    async def stream() -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b'data: {"text":"hello"}\n\n'
            yield b"data: [DONE]\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    @app.post("/fails")
    async def fails() -> JSONResponse:
        return JSONResponse({"error": {}}, status_code=500)

    RECEIPTS.record("r", Report(None, NONCE, 3, 0, 0, 0))
    RECEIPTS.end("r", NONCE)
    yield app
    RECEIPTS.take(NONCE)


async def ask(app: FastAPI, path: str, nonce: str | None = NONCE) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
        return await client.post(path, headers={} if nonce is None else {"X-InterpretOps-Nonce": nonce})


def check(reported: str) -> None:
    receipt: dict[str, Any] = json.loads(reported)
    assert (receipt["revision"], receipt["tokens_evaluated"], receipt["finished"]) == ("none", 3, True)
    assert RECEIPTS.take(NONCE) is None


@pytest.mark.parametrize("path", ["/whole", "/pieces"])
async def test_whole_answer_carries_the_receipt_as_a_header(app: FastAPI, path: str) -> None:
    """The body is unchanged, and the receipt is taken."""
    answer = await ask(app, path)
    assert answer.json() == {"text": "hello"}
    check(answer.headers["x-interpretops-receipt"])


async def test_stream_carries_the_receipt_as_its_last_event(app: FastAPI) -> None:
    """The events are unchanged; a comment follows the end marker."""
    answer = await ask(app, "/stream")
    first, end, last, rest = answer.text.split("\n\n")
    assert (first, end, rest) == ('data: {"text":"hello"}', "data: [DONE]", "")
    check(last.removeprefix(": interpretops-receipt "))


@pytest.mark.parametrize(
    ("path", "nonce"), [("/fails", NONCE), ("/whole", None), ("/stream", None), ("/whole", "cd" * 16)]
)
async def test_receipt_stays_behind_otherwise(app: FastAPI, path: str, nonce: str | None) -> None:
    """Errors, and requests without the right nonce, carry none; the receipt can still be fetched."""
    answer = await ask(app, path, nonce)
    assert "interpretops-receipt" not in f"{answer.headers}{answer.text}"
    assert RECEIPTS.take(NONCE) is not None


@pytest.mark.parametrize(("running", "finished"), [((), True), (("second",), False)])
def test_receipt_is_finished_when_all_its_engine_requests_are(
    running: tuple[str, ...], finished: bool
) -> None:
    """While one of two choices runs, the receipt says so. Requests that the front end no longer tracks have
    ended."""
    nonce = "ef" * 16
    outputs = [
        SimpleNamespace(
            request_id=name, kv_transfer_params={OUTPUT_KEY: [None, nonce, 4, 0, 0, 0]}, stop_reason=None
        )
        for name in ("first", "second")
    ]
    mark_ended(collect(outputs), running)
    receipt = RECEIPTS.take(nonce)
    assert receipt is not None
    assert (receipt.requests, receipt.tokens_evaluated, receipt.finished) == (2, 8, finished)


@pytest.mark.parametrize("path", ["/whole-fails", "/events-fail", "/early-events", "/first-event"])
async def test_refusal_reaches_the_caller_however_the_server_reports_it(app: FastAPI, path: str) -> None:
    """For a 500, a stream with an error event, or a truncated stream: status, header and code give the
    reason."""
    nonce = "12" * 16

    async def events(*texts: bytes, fail: bool = False) -> AsyncIterator[bytes]:
        for text in texts:
            yield text
        REFUSALS.record(nonce, EngineCode.NOT_RESIDENT, "revision is not resident")
        if fail:
            raise RuntimeError
        yield b'data: {"error": {"message": "Internal server error"}}\n\n'

    @app.post("/whole-fails")
    async def whole_fails() -> JSONResponse:
        REFUSALS.record(nonce, EngineCode.NOT_RESIDENT, "revision is not resident")
        return JSONResponse({"error": {}}, status_code=500)

    @app.post("/first-event")
    async def first_event() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/early-events")
    async def early_events() -> StreamingResponse:
        return StreamingResponse(events(b"data: 1\n\n", b"data: 2\n\n"), media_type="text/event-stream")

    @app.post("/events-fail")
    async def events_fail() -> StreamingResponse:
        return StreamingResponse(events(b"data: 1\n\n", fail=True), media_type="text/event-stream")

    answer = await ask(app, path, nonce)
    assert answer.status_code == 503
    assert (
        answer.headers["x-interpretops-refusal"] == answer.json()["error"]["code"] == "revision_not_resident"
    )
    assert REFUSALS.take(nonce) is None


async def test_failure_without_a_refusal_stays_a_failure(app: FastAPI) -> None:
    """Other server errors are not reported as refusals of the plugin."""

    @app.post("/dies")
    async def dies() -> JSONResponse:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        await ask(app, "/dies")


async def test_request_without_a_valid_seal_has_its_own_code(app: FastAPI) -> None:
    """vLLM's 400 that names our arguments is a refusal; one that names another field is the caller's
    error."""

    @app.post("/bad/{param}")
    async def bad(param: str) -> JSONResponse:
        return JSONResponse({"error": {"message": "vllm_xargs", "param": param}}, status_code=400)

    assert (await ask(app, "/bad/vllm_xargs")).json()["error"]["code"] == "invalid_seal"
    assert "code" not in (await ask(app, "/bad/prompt")).json()["error"]
