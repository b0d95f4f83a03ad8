"""Messages, inputs and tools may hold text, in every form that the official clients send."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from running_gateway import Start

from proxy.errors import FieldNotAllowed, InvalidRequest, Refusal
from proxy.openai_api.request_body import clean, serialize
from proxy.openai_api.routes import ROUTES, Route

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
CHAT, RESPONSES, ANTHROPIC = (
    ROUTES[path] for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages")
)


def content_of(part: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {"messages": [{"role": "user", "content": [part]}]}


SHAPES = {
    "messages": (
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}, "index": 0}
            ],
        },
        {
            "role": "user",
            "content": [{"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text"}]}],
        },
    ),
    "input": (
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "hi"}]},
        {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "hm"}]},
    ),
    "tools": ({"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}},),
    "system": ({"type": "text", "text": "be kind"},),
}


def refusal_of(route: Route, body: dict[str, Any]) -> FieldNotAllowed | InvalidRequest | None:
    try:
        serialize(clean(route, body))
    except Refusal as refusal:
        return refusal
    return None


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[Any]:
    """Every path in a JSON value."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for name, child in children:
        yield from places(child, (*path, name))


def put(value: list[Any], path: tuple[Any, ...], new: Any) -> Any:
    """A copy of the value with one path replaced."""
    if not path:
        return new
    value = copy.deepcopy(value)
    *parents, last = path
    part = value
    for name in parents:
        part = part[name]
    part[last] = new
    return value


@pytest.mark.parametrize("path", ROUTES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_json_anywhere_is_answered_or_refused(path: str, data: Any) -> None:
    """Any JSON in any field, at any depth, gives an answer or an error, never a 500."""
    route = ROUTES[path]
    name = data.draw(st.sampled_from(sorted(route.fields)))
    value = data.draw(JSON)
    if name in SHAPES:
        shaped = list(SHAPES[name])
        value = put(shaped, data.draw(st.sampled_from(list(places(shaped)))), value)
    body = {"model": "m", name: value}
    refused = refusal_of(route, json.loads(json.dumps(body)))
    if refused is not None:
        assert refused.status == 400
        assert str(refused.param or name).split("[")[0].split(".")[0] in (name, "input")


async def test_unexpected_types_cause_no_internal_error(start: Start, engine: FakeEngine) -> None:
    """A list or object in place of a type name is refused on every route of a listener."""
    front = await start("calm")
    odd = [["text"], {"text": 1}, None, 7, True, "\ud800"]
    for path, route in ROUTES.items():
        for kind in odd:
            part = {"type": kind, "text": "hi"}
            for given_fields in (
                {"messages": [{"role": "user", "content": [part]}]},
                {"messages": [{"role": kind, "content": "hi"}]},
                {"messages": [part], "system": [part]},
                {"input": [part]},
                {"input": [{"role": "user", "content": [part]}]},
                {"tools": [part], "messages": [], "input": "hi"},
                {"prompt": [part], "n": kind, "max_tokens": kind, "logit_bias": kind},
            ):
                fields = {name: value for name, value in given_fields.items() if name in route.fields}
                if not fields:
                    continue
                body = json.dumps({"model": "tiny-model", **fields})
                headers = {"Content-Type": "application/json"}
                async with front.public.post(path, data=body, headers=headers) as answer:
                    assert answer.status in (200, 400), (path, fields, await answer.text())
    assert not [line for line in front.log if line["event"] == "unforeseen"]


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, content_of({"type": "text", "text": "hi", "image_url": {"url": "http://x"}})),
        (CHAT, content_of({"type": "text", "text": "hi", "uuid": "1", "image_url": "http://x"})),
        (CHAT, content_of({"type": "refusal", "refusal": "no", "input_audio": {"data": ""}})),
        (
            CHAT,
            content_of(
                {"type": "tool_result", "content": [{"type": "text", "text": "", "source": {"a": 1}}]}
            ),
        ),
        (CHAT, {"messages": [{"role": "assistant", "content": "hi", "audio": {"id": "audio_1"}}]}),
        (CHAT, {"messages": [{"role": "user", "content": "hi", "images": ["iVBORw0"]}]}),
        (ANTHROPIC, content_of({"type": "text", "text": "hi", "source": {"type": "url", "url": "http://x"}})),
        (ANTHROPIC, {"system": [{"type": "text", "text": "hi", "source": {"url": "http://x"}}]}),
        (
            RESPONSES,
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "", "file_id": "f"}]}]},
        ),
        (RESPONSES, {"input": [{"role": "user", "content": "hi", "image_url": "http://x"}]}),
    ],
)
def test_other_content_cannot_hide_in_a_text_part(route: Route, fields: dict[str, Any]) -> None:
    """A content part or message with text holds no other content under any name that an engine reads."""
    with pytest.raises(FieldNotAllowed, match="only text is supported"):
        clean(route, {"model": "m", **fields})


@pytest.mark.parametrize("note", [{"phase": "final_answer"}, {"state": "done"}, {"parsed": {"a": 1}}])
def test_client_keys_on_a_part_are_removed(note: dict[str, Any]) -> None:
    """Unknown keys of a part are removed: they never reach the engine, and refuse no request."""
    kept = clean(CHAT, {"model": "m", **content_of({"type": "text", "text": "hi", **note})})
    assert kept["messages"] == content_of({"type": "text", "text": "hi"})["messages"]


def test_app_labels_on_a_message_are_removed() -> None:
    """A message may carry a `source` of the app's own, as a plain value that is not content."""
    messages = [{"role": "user", "content": "hi", "source": "slack", "document": 7}]
    assert clean(CHAT, {"model": "m", "messages": messages})["messages"] == [
        {"role": "user", "content": "hi"}
    ]
    with pytest.raises(FieldNotAllowed, match="only text is supported"):
        clean(CHAT, {"model": "m", "messages": [{"role": "user", "content": "hi", "source": {"url": "x"}}]})


def test_null_field_is_ignored() -> None:
    """Clients send unset fields as null; only values are refused."""
    body = {"model": "m", "messages": [], "functions": None, "best_of": None}
    assert clean(CHAT, body) == {"model": "m", "messages": []}


@pytest.mark.parametrize("content", [7, True, {"type": "text"}])
def test_content_is_text_or_a_list(content: Any) -> None:
    """Other types of content are refused with their path."""
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": content}]
    with pytest.raises(InvalidRequest, match=r"messages\[1\].content must be"):
        clean(CHAT, {"model": "m", "messages": messages})


def test_client_keys_on_messages_are_removed() -> None:
    """Ids and times that a client keeps on its messages, and empty fields of any name, are removed without an
    error."""
    noted = {"id": "m1", "createdAt": "2026-01-01", "task": "action", "audio": None, "images": []}
    part = {"type": "text", "text": "hi", "image_url": None, "cache_control": {"type": "ephemeral"}}
    body = {"model": "m", "messages": [{"role": "user", "content": [part], **noted}]}
    sent = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    assert clean(CHAT, body)["messages"] == [{"role": "user", "content": [sent]}]


def test_official_clients_content_is_accepted() -> None:
    """Answers of the official packages, sent back as history, are accepted unchanged."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = ChatCompletionMessage(role="assistant", content=None, tool_calls=[call], annotations=[])
    turn = [said.model_dump(), {"role": "tool", "tool_call_id": "c", "content": "1", "name": "f"}]
    clean(CHAT, {"model": "m", "messages": turn})
    text = {"type": "output_text", "text": "hi", "annotations": [], "logprobs": None}
    reported = openai.types.responses.ResponseOutputMessage(
        id="m", content=[text], role="assistant", status="completed", type="message"
    )
    thought = openai.types.responses.ResponseReasoningItem(
        id="r", summary=[{"type": "summary_text", "text": "hm"}], type="reasoning"
    )
    asked = openai.types.responses.ResponseFunctionToolCall(
        arguments="{}", call_id="c", name="f", type="function_call", id="x", status="completed"
    )
    items = [reported.model_dump(), thought.model_dump(), asked.model_dump()]
    items.append({"type": "function_call_output", "call_id": "c", "output": "1"})
    clean(RESPONSES, {"model": "m", "input": items})
    blocks = [
        anthropic.types.ThinkingBlock(type="thinking", thinking="hm", signature="s"),
        anthropic.types.TextBlock(type="text", text="hi", citations=None),
        anthropic.types.ToolUseBlock(type="tool_use", id="t", name="f", input={}),
    ]
    result = {"type": "tool_result", "tool_use_id": "t", "is_error": False, "content": "1"}
    cached = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
    turn = [
        {"role": "assistant", "content": [block.model_dump() for block in blocks]},
        {"role": "user", "content": [result, cached]},
    ]
    clean(ANTHROPIC, {"model": "m", "messages": turn, "system": [cached]})
