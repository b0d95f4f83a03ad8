"""A receipt proves a whole answer: each of its engine requests, to the end, and every reported token."""

import json
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from running_gateway import Start

from interpretops.engine_api import Receipt
from proxy.openai_api.request_size import Size
from proxy.openai_api.sse import SseSplitter
from proxy.verification.receipt_proof import AnswerUsage, answer_usage, receipt_fault, stream_usage

MANDATORY = [{"policy": "calm", "mode": "mandatory"}]
REVISION = "ab" * 32


def receipt(**fields: int) -> Receipt:
    given = {"revision": REVISION, "requests": 1, "tokens_evaluated": 9, "finished": True, **fields}
    return Receipt.model_validate(given)


@given(st.integers(1, 50), st.integers(1, 4), st.integers(1, 300), st.integers(0, 300), st.integers(0, 100))
def test_correct_receipt_proves_and_one_token_less_does_not(
    prompts: int, choices: int, prompt: int, answer: int, again: int
) -> None:
    """The minimum is prompt plus answer except each last token; recomputed tokens come on top."""
    size, requests = Size(prompts, choices), prompts * choices
    reported = AnswerUsage(prompts * prompt, requests * answer)
    least = requests * max(1, prompt + answer - 1)
    assert (
        receipt_fault(receipt(requests=requests, tokens_evaluated=least + again), REVISION, size, reported)
        is None
    )
    cached = min(least - requests, again)
    honest = receipt(requests=requests, tokens_evaluated=least - cached, cached_tokens=cached)
    assert receipt_fault(honest, REVISION, size, reported) is None
    short = receipt(requests=requests, tokens_evaluated=least - 1)
    assert receipt_fault(short, REVISION, size, reported) is not None


@pytest.mark.parametrize(
    "short",
    [
        {"requests": 1},
        {"requests": 5},
        {"requests": 3},
        {"finished": False},
        {"tokens_evaluated": 3, "cached_tokens": 100},
        {"tokens_evaluated": 10},
    ],
)
async def test_receipt_that_proves_part_of_a_request_withholds_it(
    start: Start, engine: FakeEngine, short: dict[str, Any]
) -> None:
    """Two prompts with two choices each are four engine requests: if any is missing, nothing is sent."""
    front = await start("calm", bindings=MANDATORY)
    usage = {"prompt_tokens": 10, "completion_tokens": 8}
    engine.script = lambda body: [{"choices": [{"text": "leak"}], "usage": usage}]
    body = {"model": "tiny-model", "prompt": ["a", "b"], "n": 2}

    async def ask() -> tuple[int, str]:
        async with front.public.post("/v1/completions", json=body) as answer:
            return answer.status, await answer.text()

    engine.more = {"tokens_evaluated": 24}
    assert (await ask())[0] == 200
    engine.more = {"tokens_evaluated": 24, **short}
    status, text = await ask()
    assert (status, json.loads(text)["error"]["code"]) == (502, "receipt_failed")
    assert "leak" not in text


async def test_stream_longer_than_its_receipt_is_not_completed(start: Start, engine: FakeEngine) -> None:
    """Without `usage` a stream is bounded by its events, with it by its figures: no end marker is sent."""
    front = await start("calm", bindings=MANDATORY)
    engine.script = lambda body: [{"choices": [{"text": "x"}]}] * 40
    engine.more = {"tokens_evaluated": 20}
    assert (await front.chat(stream=True))[2].endswith("data: [DONE]\n\n")
    engine.more = {"tokens_evaluated": 10}
    assert "receipt_failed" in (reported := (await front.chat(stream=True))[2])
    assert "[DONE]" not in reported
    usage = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 8}}
    engine.script = lambda body: [{"choices": [{"text": "x"}]}, usage]
    engine.more = {"tokens_evaluated": 12}
    assert (await front.chat(stream=True))[2].endswith("data: [DONE]\n\n")
    engine.more = {"tokens_evaluated": 11}
    assert "[DONE]" not in (await front.chat(stream=True))[2]


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_usage_of_named_streams_is_found(cut: int) -> None:
    """The Responses API reports usage in its last event, the Messages API in the one before."""
    responses = (
        b'event: response.output_text.delta\ndata: {"delta":"a"}\n\n'
        b'event: response.completed\ndata: {"response":{"usage":{"input_tokens":7,"output_tokens":3}}}\n\n'
    )
    messages = (
        b'event: message_delta\ndata: {"usage":{"input_tokens":7,"output_tokens":3}}\n\n'
        b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    )
    for end, stream in ((b"event: response.completed\n", responses), (b"event: message_stop\n", messages)):
        splitter = SseSplitter(end)
        for at in range(0, len(stream), cut):
            splitter.feed(stream[at : at + cut])
        assert stream_usage(splitter, named=True) == AnswerUsage(7, 3, 0)


async def test_missing_usage_bounds_nothing_and_a_malformed_answer_raises() -> None:
    """Answers without usage are proven by requests and revision; a malformed answer raises."""
    for answer in ({}, {"usage": None}, {"usage": {"prompt_tokens": "7"}}, {"usage": []}):
        assert await answer_usage(json.dumps(answer).encode()) == AnswerUsage()
    large = json.dumps({"text": "x" * 300_000, "usage": {"input_tokens": 2, "output_tokens": 1}})
    assert await answer_usage(large.encode()) == AnswerUsage(2, 1)
    for answer in (b"", b"[]", b"{"):
        with pytest.raises(ValueError, match=r"."):
            await answer_usage(answer)
