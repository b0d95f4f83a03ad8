"""The generated text of every route is found once, complete, streamed or not."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from proxy.openai_api.answer_text import answer_texts

REQUEST = {"model": "m", "instructions": "be kind", "text": {"format": {"type": "text"}}}
"""Fields of a response that repeat the request."""


@pytest.mark.parametrize(
    ("answer", "streamed", "texts"),
    [
        ({"choices": [{"index": 0, "message": {"role": "assistant", "content": "a"}}]}, False, ["a"]),
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, False, ["a", "b"]),
        ({"output": [{"content": [{"text": "a"}]}, {"arguments": "{}"}]}, False, ["a", "{}"]),
        ({"output": [{"type": "custom_tool_call", "name": "f", "input": "a"}]}, False, ["a"]),
        ({"output": [], "tools": [{"parameters": {"text": "b"}}], "text": "c"}, False, []),
        ({"content": [{"type": "tool_use", "name": "f", "input": {"x": "a"}}]}, False, ['{"x": "a"}']),
        (
            [
                {"choices": [{"index": i, "delta": {"content": text}}]}
                for i, text in ((0, "a"), (1, "x"), (0, "b"))
            ],
            True,
            ["ab", "x"],
        ),
        ([{"index": 0, "delta": {"text": "a"}}, {"index": 0, "delta": {"text": "b"}}], True, ["ab"]),
        ([{"output_index": 0, "delta": "a"}, {"output_index": 0, "delta": "b"}], True, ["ab"]),
    ],
)
def test_text_pieces_of_every_route_are_joined(answer: Any, streamed: bool, texts: list[str]) -> None:
    """Chat, completions, responses and messages, streamed or not; personal data may span events."""
    raw = json.dumps(answer).encode()
    if streamed:
        raw = b"".join(b"event: x\ndata: " + json.dumps(event).encode() + b"\n\n" for event in answer)
    assert answer_texts(raw + b"data: [DONE]\n\n" if streamed else raw, streamed=streamed) == texts


def lines(events: list[Any]) -> bytes:
    return b"".join(b"data: %s\n\n" % event.model_dump_json().encode() for event in events)


def test_streamed_response_yields_each_text_once() -> None:
    """Its last events repeat the whole text, and its first ones repeat the request."""
    from vllm.entrypoints.openai.responses import streaming_events as engine

    state = engine.SimpleStreamingState()
    events = engine.emit_simple_reasoning_open(state)
    events += [event for part in ("hm", "m") for event in engine.emit_simple_reasoning_delta(state, part)]
    events += engine.emit_simple_reasoning_done(state) + engine.emit_simple_content_open(state)
    events += [event for part in ("ice ", "cream") for event in engine.emit_simple_content_delta(state, part)]
    events += engine.emit_simple_content_done(state)
    created = {"type": "response.created", "response": {**REQUEST, "output": []}}
    stream = b"data: %s\n\n" % json.dumps(created).encode() + lines(events)
    assert b"response.output_item.done" in stream
    assert answer_texts(stream, streamed=True) == ["hmm", "ice cream"]


async def test_streamed_message_yields_each_text_once() -> None:
    """Its blocks start empty; tool arguments arrive in pieces, but are an object when not streamed."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": '{"x": "a"}'}}
    deltas = [{"role": "assistant", "content": ""}, {"content": "ice "}, {"content": "cream"}]
    deltas += [{"tool_calls": [call]}]
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}

    async def chat() -> AsyncIterator[Any]:
        for delta in deltas:
            yield f"data: {json.dumps({**chunk, 'choices': [{'index': 0, 'delta': delta}]})}\n\n"
        yield f"data: {json.dumps({**chunk, 'choices': [], 'usage': usage})}\n\n"
        yield "data: [DONE]\n\n"

    serving = object.__new__(AnthropicServingMessages)
    stream = "".join([event async for event in serving.message_stream_converter(chat())])
    assert "content_block_start" in stream
    message = {"role": "assistant", "content": "ice cream", "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    whole = {**chunk, "object": "chat.completion", "choices": [choice], "usage": usage}
    answer = serving.messages_full_converter(ChatCompletionResponse.model_validate(whole))
    for raw, streamed in ((stream, True), (answer.model_dump_json(), False)):
        assert answer_texts(raw.encode(), streamed=streamed) == ["ice cream", '{"x": "a"}']


def test_unexpected_types_break_nothing() -> None:
    """A value of an unexpected type breaks nothing: the rest is read."""
    answer = json.dumps({"content": [{"type": ["tool_use"], "input": {"text": "a"}}]}).encode()
    assert answer_texts(answer, streamed=False) == ["a"]
