"""What reaches the client, and what is withheld, whatever the engine does."""

import asyncio
import json
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Start


async def test_answer_carries_revision_and_receipt(start: Start, engine: FakeEngine) -> None:
    """A steered answer names its revision and carries the engine's receipt."""
    front = await start("calm")
    status, headers, body = await front.chat(headers={"X-Steering-Policy": "calm", "X-Request-Id": "abc"})
    (revision,) = engine.plans
    receipt = json.loads(headers["X-Steering-Receipt"])
    assert (status, body["choices"][0]["text"]) == (200, revision)
    assert headers["X-Steering-Policy"] == f"calm@{revision[:12]}"
    assert headers["X-Request-Id"] == "abc"
    assert (receipt["policy"], receipt["revision"], receipt["tokens_evaluated"]) == ("calm", revision, 3)


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"model": "gone"}])
async def test_answer_says_how_long_it_took(start: Start, fields: dict[str, Any]) -> None:
    """OpenAI's timing header is on answers, streams and errors."""
    front = await start("calm")
    _, headers, _ = await front.chat(**{"model": "tiny-model+calm", **fields})
    assert 0 <= int(headers["openai-processing-ms"]) < 30_000


@pytest.mark.parametrize("stream", [False, True])
async def test_missing_receipt_is_fetched_separately(start: Start, engine: FakeEngine, stream: bool) -> None:
    """For an engine with an older plugin, the gateway fetches the receipt separately."""
    front = await start("calm")
    engine.trick = "older_plugin"
    status, headers, body = await front.chat(model="tiny-model+calm", stream=stream)
    assert status == 200
    reported = body.split(": steering-receipt ")[1] if stream else headers["X-Steering-Receipt"]
    assert reported.startswith('{"policy":"calm"')
    assert engine.receipts == {}


@pytest.mark.parametrize("trick", ["no_receipt", "wrong_revision", "nothing_evaluated"])
async def test_answer_without_proof_is_withheld(start: Start, engine: FakeEngine, trick: str) -> None:
    """Without a receipt for the required revision no part of the answer reaches the client."""
    front = await start("calm")
    engine.trick = trick
    status, headers, body = await front.chat(model="tiny-model+calm")
    assert status == 502
    assert body["error"]["code"] == "receipt_failed"
    assert headers["x-should-retry"] == "false"
    assert "choices" not in body
    assert b'interpretops_receipts_failed_total{policy="calm"} 1.0' in front.apps.gateway.metrics.render()


async def test_stream_is_relayed_and_ends_with_its_receipt(start: Start, engine: FakeEngine) -> None:
    """A stream's events arrive unchanged, then the receipt as a comment, then the end marker, once."""
    front = await start("calm")
    status, headers, text = await front.chat(model="tiny-model+calm", stream=True)
    events = text.split("\n\n")
    assert status == 200
    assert headers["Content-Type"].startswith("text/event-stream")
    assert headers["X-Steering-Policy"].startswith("calm@")
    assert [json.loads(event.removeprefix("data: "))["n"] for event in events[:4]] == [0, 1, 2, 3]
    assert json.loads(events[4].removeprefix(": steering-receipt "))["revision"] in engine.plans
    assert events[5:] == ["data: [DONE]", ""]


@pytest.mark.parametrize(
    ("trick", "code"),
    [
        ("dies", "engine_failed"),
        ("no_done", "engine_failed"),
        ("no_receipt", "receipt_failed"),
        ("wrong_revision", "receipt_failed"),
    ],
)
async def test_broken_stream_ends_in_an_error_without_end_marker(
    start: Start, engine: FakeEngine, trick: str, code: str
) -> None:
    """A truncated or unproven stream ends in an error in OpenAI's format, after complete events."""
    front = await start("calm")
    engine.trick = trick
    _, _, text = await front.chat(model="tiny-model+calm", stream=True)
    *before, last = [event for event in text.split("\n\n") if event]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == code
    assert all("n" in json.loads(event.removeprefix("data: ")) for event in before)
    assert "data: [DONE]\n" not in text


async def test_engine_error_event_suppresses_the_end_marker(start: Start, engine: FakeEngine) -> None:
    """The engine sends its end marker even after an error; the client must not take it for success."""
    front = await start("calm")
    engine.trick = "error_event"
    _, _, text = await front.chat(model="tiny-model+calm", stream=True)
    assert '"error": {"message": "engine core died"}' in text
    assert "data: [DONE]\n" not in text


@pytest.mark.parametrize(
    ("trick", "stream", "limit"),
    [
        ("hold", False, "gateway.request_timeout_s"),
        ("hold", True, "gateway.stream_idle_timeout_s"),
        ("hold_stream", True, "gateway.stream_idle_timeout_s"),
    ],
)
async def test_timeout_is_distinguished_from_failure(
    start: Start, engine: FakeEngine, trick: str, stream: bool, limit: str
) -> None:
    """A 504, or an error event if the stream has started; the engine's request is closed."""
    front = await start("calm", **{limit: 0.3})
    engine.trick = trick
    status, _, body = await front.chat(model="tiny-model", stream=stream)
    begun = trick == "hold_stream"
    last = [line for line in body.split("\n\n") if line][-1].removeprefix("data: ") if stream else body
    error = (json.loads(last) if stream else body)["error"]
    assert (status, error["code"]) == (200 if begun else 504, "engine_timeout")
    assert not stream or "data: [DONE]\n" not in body
    await asyncio.wait_for(engine.aborted.wait(), 5)


@pytest.mark.parametrize(("trick", "stream"), [("hold", False), ("hold", True), ("hold_stream", True)])
async def test_client_that_leaves_stops_the_engine(
    start: Start, engine: FakeEngine, trick: str, stream: bool
) -> None:
    """When a client disconnects, before the first byte or midway, the engine's request is closed."""
    front = await start("calm")
    engine.trick = trick
    body = {"model": "tiny-model", "messages": [], "stream": stream}
    request = asyncio.create_task(front.public.post("/v1/chat/completions", json=body))
    await engine.arrived.wait()
    if trick == "hold_stream":
        answer = await request
        await answer.content.readany()
        answer.close()
    else:
        request.cancel()
    await asyncio.wait_for(engine.aborted.wait(), 5)


async def test_engine_refusals_keep_openai_shape(start: Start, engine: FakeEngine) -> None:
    """The engine's internal errors arrive as one of our codes, without their text."""
    front = await start("calm")
    engine.trick = "inner_failure"
    status, _, body = await front.chat(model="tiny-model+calm")
    assert "secret" not in body["error"]["message"]
    assert (status, body["error"]["type"], body["error"]["code"]) == (502, "server_error", "engine_failed")


async def test_restarted_engine_is_noticed_before_its_first_byte(start: Start, engine: FakeEngine) -> None:
    """An engine restarted behind the same address answers nobody before it is proven again."""
    front = await start("calm")
    await engine.restart()
    for stream in (True, False):
        status, _, body = await front.chat(stream=stream)
        error = (json.loads(body) if stream else body)["error"]
        assert (status, error["code"]) == (503, "engine_not_ready")
    assert len(engine.seen) == 1


async def test_nothing_of_a_request_is_logged(start: Start, engine: FakeEngine) -> None:
    """Neither prompts nor answers nor keys reach the log or the metrics."""
    front = await start("calm")
    secret = "canary-5f3a"
    messages = [{"role": "user", "content": secret}]
    await front.chat(messages=messages, headers={"Authorization": f"Bearer {secret}"})
    await front.chat(messages=messages, stream=True, user=secret)
    await front.chat(messages=messages, unknown_field=secret)
    assert len([entry for entry in front.log if entry["event"] == "request"]) == 3
    assert secret not in json.dumps(front.log)
    assert secret.encode() not in front.apps.gateway.metrics.render()
