"""The gateway's buffer for an answer is bounded: an engine that never stops sending is cut off."""

from pathlib import Path

import pytest
from fake_engine import FakeEngine
from running_gateway import Start, Until

from interpretops.records.transcript_file import make_key
from proxy.engines.http_connection import AnswerTooLargeError
from proxy.openai_api.routes import ROUTES
from proxy.verification.internal_request import ask

BOUND = {"gateway.max_answer_bytes": 8 * 2**20}
MOST_WRITTEN = 16
"""MiB: the limit, plus what sockets and buffers in between hold."""
PLAIN = {"/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]}}
ASKED = {
    "/v1/chat/completions": {"messages": []},
    "/v1/completions": {"prompt": "a"},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": []},
    **PLAIN,
}


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("trick", ["", "huge_stated"])
async def test_answer_buffer_is_bounded(
    start: Start, engine: FakeEngine, until: Until, path: str, trick: str
) -> None:
    """Of 200 MiB at most the limit is read; the caller gets an error, and the engine is stopped."""
    front = await start("calm", **BOUND, tenants=[{"id": "anonymous", "limits": {"tokens_per_minute": 99}}])
    engine.huge, engine.trick, engine.more = 200, trick, {"cached_tokens": 40}
    async with front.public.post(path, json={"model": "tiny-model", **ASKED[path]}) as answer:
        error = (await answer.json())["error"]
    assert (answer.status, error["code"]) == (400, "answer_too_large")
    assert "gateway.max_answer_bytes" in error["message"]
    assert ("stream" in error["message"]) == (path not in PLAIN)
    if path not in PLAIN:
        # The tokens were processed, so they are billed.
        assert 'tenant_tokens_total{tenant="anonymous"} 43.0' in front.apps.gateway.metrics.render().decode()
        await until(lambda: gone(engine))
    assert engine.written <= MOST_WRITTEN


async def gone(engine: FakeEngine) -> bool:
    return engine.aborted.is_set()


async def test_answer_within_the_bound_arrives(start: Start, engine: FakeEngine) -> None:
    """An answer within the limit arrives, whatever its headers say about its length."""
    front = await start("calm", **BOUND)
    engine.huge = 7
    for engine.trick in ("", "huge_stated"):
        async with front.public.post("/tokenize", json={"model": "tiny-model", "prompt": "a"}) as answer:
            assert (answer.status, len(await answer.read())) == (200, 7 * 2**20)


async def test_stream_has_no_bound(start: Start, engine: FakeEngine) -> None:
    """Streamed data is passed on without buffering, however long the stream."""
    front = await start("calm", **{"gateway.max_answer_bytes": 64 * 1024})
    event = {"choices": [{"text": "a" * 100_000}]}
    engine.script = lambda body: [event] * 20
    status, _, text = await front.chat(stream=True)
    assert (status, text.count('"choices"')) == (200, 20)


async def test_engine_error_buffer_is_bounded(start: Start, engine: FakeEngine, until: Until) -> None:
    """An endless error body is a failure of the engine, and does not fill our memory."""
    front = await start("calm")
    engine.huge, engine.trick = 200, "huge_error"
    status, _, body = await front.chat()
    assert (status, body["error"]["code"]) == (502, "engine_failed")
    assert engine.written <= MOST_WRITTEN


async def test_internal_requests_are_bounded_too(start: Start, engine: FakeEngine) -> None:
    """The gateway's own requests, of canary and shadows, are bounded too."""
    front = await start("calm")
    engine.huge = 200
    proven = front.apps.gateway.fleet.current
    with pytest.raises(AnswerTooLargeError):
        await ask(proven, ROUTES["/v1/completions"], {"model": "tiny-model", "prompt": "a"}, "none", 10)
    assert engine.written <= MOST_WRITTEN


async def test_long_stream_is_not_buffered_for_its_transcript(
    start: Start, engine: FakeEngine, until: Until, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream too long to store, of an opted-in tenant, is logged and counted as a lost transcript."""
    monkeypatch.setenv("KEPT", make_key())
    monkeypatch.setattr("proxy.observe.request_context._MAX_HELD", 1000)
    tenants = [{"id": "anonymous", "transcripts": {"key": "env:KEPT"}}]
    front = await start("calm", tenants=tenants, **{"paths.transcripts": tmp_path / "kept"})
    engine.script = lambda body: [{"choices": [{"text": "a" * 100}]}] * 20
    await front.chat(stream=True)

    async def lost() -> list[dict[str, str]]:
        return [line for line in front.log if line["event"] == "transcript_lost"]

    await until(lost)
    assert (await lost())[0]["kind"] == "too_long"
