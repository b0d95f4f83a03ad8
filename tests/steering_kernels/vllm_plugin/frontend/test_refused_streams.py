"""A refusal gate that opens in the middle of a stream: what was begun is ended, nothing new is shown."""

import json
from typing import Any

import pytest

from steering_kernels.vllm_plugin.core.refusal_stop import refusal_mark, refusal_of
from steering_kernels.vllm_plugin.frontend.refused_answers import refused_answer
from steering_kernels.vllm_plugin.frontend.refused_streams import REFUSED_STREAMS

NONCE, TEXT = "ab" * 16, "No."
MARK = refusal_mark(NONCE) + TEXT


def event(data: dict[str, Any], *, named: bool = True) -> bytes:
    name = f"event: {data['type']}\n" if named else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


def shown(path: str, before: list[bytes], after: list[bytes]) -> list[Any]:
    """The data of the events sent instead of ``after``, when ``before`` was sent already."""
    stream = REFUSED_STREAMS[path](NONCE)
    for one in before:
        stream.note(one)
    sent = b"".join(part for one in after for part in stream.rewrite(one, TEXT))
    return [json.loads(line[6:]) for line in sent.split(b"\n") if line.startswith(b"data: {")]


def test_tool_call_that_had_begun_is_never_completed_in_a_response() -> None:
    """Of a function call that was begun no further argument is sent, and the final output lacks it."""
    call = {"id": "fc_1", "type": "function_call", "name": "act", "arguments": ""}
    head: list[dict[str, Any]] = [{"type": "response.created"}, {"type": "response.in_progress"}]
    begun: dict[str, Any] = {"type": "response.output_item.added", "output_index": 0, "item": call}
    rest: list[dict[str, Any]] = [
        {"type": "response.function_call_arguments.delta", "item_id": "fc_1", "delta": "secret"},
        {"type": "response.function_call_arguments.done", "item_id": "fc_1", "arguments": "secret"},
        {"type": "response.output_item.done", "item": {**call, "arguments": "secret"}},
        {"type": "response.completed", "response": {"output": [{**call, "arguments": "secret"}]}},
    ]
    found = shown("/v1/responses", [event(e) for e in (*head, begun)], [event(e) for e in rest])
    assert "secret" not in json.dumps(found)
    assert [one["sequence_number"] for one in found] == list(range(3, 3 + len(found)))
    (item,) = found[-1]["response"]["output"]
    assert (item["content"], found[0]["output_index"]) == ([{"type": "refusal", "refusal": TEXT}], 1)


def test_message_that_had_begun_is_ended_before_the_refusal_in_a_response() -> None:
    """Its closing events pass, what is new does not, and the refusal is a second item."""
    item = {"id": "msg_1", "type": "message", "content": []}
    begun: list[dict[str, Any]] = [
        {"type": "response.created"},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
    ]
    rest: list[dict[str, Any]] = [
        {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "secret"},
        {"type": "response.output_item.done", "item": item},
        {"type": "response.output_item.added", "output_index": 1, "item": {**item, "id": "msg_2"}},
        {"type": "response.output_item.done", "item": {**item, "id": "msg_2"}},
        {"type": "response.completed", "response": {"output": [item, {**item, "id": "msg_2"}]}},
    ]
    found = shown("/v1/responses", [event(e) for e in begun], [event(e) for e in rest])
    assert found[0]["item"]["id"] == "msg_1"
    assert [one["id"] for one in found[-1]["response"]["output"]] == ["msg_1", found[-2]["item"]["id"]]
    assert "secret" not in json.dumps(found)


def test_block_that_had_begun_is_ended_before_the_refusal_in_a_message() -> None:
    """The open block is stopped, a block that begins later is dropped, and the refusal is the next block."""
    begun: dict[str, Any] = {
        "type": "content_block_start",
        "index": 0,
        "content_block": {"type": "text", "text": ""},
    }
    rest: list[dict[str, Any]] = [
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "secret"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "name": "secret"}},
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "stop_sequence", "stop_sequence": MARK}},
        {"type": "message_stop"},
    ]
    found = shown("/v1/messages", [event({"type": "message_start"}), event(begun)], [event(e) for e in rest])
    assert [(one["type"], one.get("index")) for one in found] == [
        ("content_block_stop", 0),
        ("content_block_start", 1),
        ("content_block_delta", 1),
        ("content_block_stop", 1),
        ("message_delta", None),
        ("message_stop", None),
    ]
    assert found[4]["delta"] == {"stop_reason": "refusal", "stop_sequence": None}
    assert "secret" not in json.dumps(found)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_text_merged_with_the_stop_is_dropped(path: str) -> None:
    """When the server joins earlier tokens with the last event, none of them is sent with the refusal."""
    said = {"delta": {"content": "secret"}} if "chat" in path else {"text": "secret"}
    choice = {
        **said,
        "index": 1,
        "finish_reason": "stop",
        "stop_reason": MARK,
        "logprobs": {"content": ["secret"]},
        "token_ids": [1],
    }
    chunk = {"choices": [choice], "model": "m"}
    other = {"choices": [{**choice, "index": 0, "stop_reason": None}], "model": "m"}
    found = shown(path, [], [event(other, named=False), event(chunk, named=False)])
    assert found[0] == other
    assert "secret" not in json.dumps(found[1:])
    assert {c["index"] for one in found[1:] for c in one["choices"]} == {1}
    assert all(c["token_ids"] is c["stop_reason"] is None for one in found[1:] for c in one["choices"])


def test_only_the_mark_with_the_requests_nonce_counts() -> None:
    """Stop tokens, a client's stop strings and the mark of another request are no refusals."""
    assert refusal_of(MARK, NONCE) == TEXT
    for other in (None, 2, "No.", refusal_mark("cd" * 16) + TEXT):
        assert refusal_of(other, NONCE) is None


def test_route_without_a_form_for_refusals_has_none() -> None:
    """Answers of other routes are not guessed at; the caller withholds them."""
    assert refused_answer("/v1/other", b"{}", NONCE, TEXT) is None
    assert "/v1/other" not in REFUSED_STREAMS
