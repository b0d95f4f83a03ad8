"""The caller's text reaches the engine as text: no special tokens, on any route, in any field."""

import asyncio
import copy
import json
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Start

from interpretops.engine_api import SpecialTokenList
from interpretops.errors import EngineError
from interpretops.special_tokens import JOINER, SpecialTokens
from proxy.errors import FieldNotAllowed, InvalidRequest, Refusal
from proxy.openai_api.prompt_text import neutralize_special_tokens
from proxy.openai_api.route_fields import Field
from proxy.openai_api.routes import ROUTES

END = "<|end|>"
INERT = f"<{JOINER}|end|>"
SPECIAL = SpecialTokens({END: 0, "<|begin|>": 1}, first=1)
TOOL = {
    "type": "function",
    "function": {"name": END, "parameters": {"properties": {END: {"description": END}}}},
}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": END, "function": {"name": END, "arguments": f'{{"{END}": 1}}'}}],
}
RESULT = {"type": "tool_result", "content": [{"type": "text", "text": END}]}
SAID = [
    {"role": "system", "content": END, "name": END},
    {"role": "user", "content": [{"type": "text", "text": END}, {"type": "text", "text": f"a {END} b"}]},
    CALL,
    {"role": "tool", "content": END, "tool_call_id": END},
]
WRITTEN: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": SAID,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": END}},
        "documents": [{"title": END, "text": END}],
        "chat_template_kwargs": {END: [END]},
        "response_format": {"type": "json_schema", "json_schema": {"name": END, "schema": {"const": END}}},
    },
    "/v1/completions": {"prompt": [END, f"a{END}"], "suffix": END},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": END}]},
            {"type": "function_call", "name": END, "arguments": END, "call_id": END},
            {"type": "function_call_output", "output": END, "call_id": END},
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": END}]},
        ],
        "instructions": END,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": END},
        "chat_template_kwargs": {END: END},
        "text": {"format": {"type": "json_schema", "name": END, "schema": {"const": END}}},
    },
    "/v1/messages": {
        "system": [{"type": "text", "text": END}],
        "messages": [
            {"role": "user", "content": END},
            {"role": "assistant", "content": [{"type": "tool_use", "name": END, "input": {END: END}}]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "content": [{"type": "text", "text": END}]}],
            },
        ],
        "tools": [{"name": END, "input_schema": {"properties": {END: {}}}}],
        "tool_choice": {"type": "tool", "name": END},
        "chat_template_kwargs": {END: END},
        "output_config": {"format": {"type": "json_schema", "schema": {"const": END}}},
    },
    "/tokenize": {"messages": SAID, "prompt": END, "tools": [TOOL], "chat_template_kwargs": {END: END}},
}
WRITTEN["/v1/messages/count_tokens"] = {
    name: value for name, value in WRITTEN["/v1/messages"].items() if name != "output_config"
}
PASSED = {"stop": [END], "model": END, "cache_salt": END, "bad_words": [END], "stop_sequences": [END]}


@pytest.mark.parametrize("path", [path for path in ROUTES if path != "/detokenize"])
def test_every_string_of_the_prompt_is_neutralized(path: str) -> None:
    """On every route, in every field that becomes part of the prompt, at any depth, keys included."""
    route, body = ROUTES[path], WRITTEN[path]
    assert set(body) == {name for name, field in route.fields.items() if field.text}
    passed = {name: value for name, value in PASSED.items() if name in route.fields}
    before = copy.deepcopy(body)
    found = neutralize_special_tokens(route, body | passed, SPECIAL)
    text = json.dumps({name: found[name] for name in body}, ensure_ascii=False)
    assert END not in text
    assert text == json.dumps(body).replace(END, INERT)
    assert {name: found[name] for name in passed} == passed
    assert body == before


@pytest.mark.parametrize("path", WRITTEN)
def test_other_content_passes_unchanged(path: str) -> None:
    """Text without special tokens reaches the engine unchanged."""
    plain = json.loads(json.dumps(WRITTEN[path]).replace(END, "if a < b: <b>x</b> \u2060"))
    assert neutralize_special_tokens(ROUTES[path], plain, SPECIAL) == plain


def test_operators_in_schemas_reach_the_grammar_unchanged() -> None:
    """`<` starts every special token, but in schemas and tool arguments it is quoted."""
    schema = {"properties": {"op": {"enum": ["=", "<", ">", "<=", "|"]}}, "required": ["op"]}
    chat = {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
        "messages": [
            {"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {"op": "<"}}]}
        ],
    }
    assert neutralize_special_tokens(ROUTES["/v1/chat/completions"], chat, SPECIAL) == chat
    for path, body in (
        ("/v1/responses", {"text": {"format": {"type": "json_schema", "schema": schema}}}),
        ("/v1/messages", {"output_config": {"format": {"type": "json_schema", "schema": schema}}}),
        ("/v1/messages", {"tools": [{"name": "f", "input_schema": schema}]}),
    ):
        assert neutralize_special_tokens(ROUTES[path], body, SPECIAL) == body
    # It is unknown how templates write their own variables, or documents.
    bare = {"documents": [{"parameters": {"a": "<"}}], "chat_template_kwargs": {"input": {"a": "<"}}}
    assert f"<{JOINER}" in json.dumps(
        neutralize_special_tokens(ROUTES["/v1/chat/completions"], bare, SPECIAL), ensure_ascii=False
    )
    spelt = {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"enum": [END]}}}]}
    assert END not in json.dumps(neutralize_special_tokens(ROUTES["/v1/chat/completions"], spelt, SPECIAL))


@pytest.mark.parametrize(
    "escaped", [r"\u003c|end|>", r"<\u007cend|>", r"\u003c\u007c\u0065nd|>", r"<|end|\u003e"]
)
def test_escapes_in_arguments_spell_no_special_token(escaped: str) -> None:
    """The engine parses tool arguments as JSON, and templates write the parsed value."""
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": f'{{"a": "{escaped}"}}'}}],
    }
    item = {"type": "function_call", "name": "f", "arguments": f'{{"a": "{escaped}"}}'}
    chat = neutralize_special_tokens(ROUTES["/v1/chat/completions"], {"messages": [call]}, SPECIAL)
    made = [
        chat["messages"][0]["tool_calls"][0]["function"]["arguments"],
        neutralize_special_tokens(ROUTES["/v1/responses"], {"input": [item]}, SPECIAL)["input"][0][
            "arguments"
        ],
    ]
    for arguments in made:
        assert END not in json.dumps(json.loads(arguments), ensure_ascii=False)
    ordinary = {"messages": [{"tool_calls": [{"function": {"arguments": '{"a": "line\\n\\u00e9"}'}}]}]}
    assert neutralize_special_tokens(ROUTES["/v1/chat/completions"], ordinary, SPECIAL) == ordinary
    with pytest.raises(InvalidRequest, match="must be JSON"):
        neutralize_special_tokens(
            ROUTES["/v1/chat/completions"],
            {"messages": [{"tool_calls": [{"function": {"arguments": "\\u003c|end|>"}}]}]},
            SPECIAL,
        )


@pytest.mark.parametrize("blank", ["", " ", "\n\t ", "\u00a0"])
@pytest.mark.parametrize("cut", range(1, len(END)))
def test_parts_that_a_template_trims_join_into_no_special_token(blank: str, cut: int) -> None:
    """Some templates trim every part and append it to the one before."""
    parts = [f"hello {END[:cut]}{blank}", f"{blank}{END[cut:]} there"]
    messages = [{"role": "user", "content": [{"type": "text", "text": part} for part in parts]}]
    found = neutralize_special_tokens(ROUTES["/v1/chat/completions"], {"messages": messages}, SPECIAL)
    rendered = "".join(part["text"].strip() for part in found["messages"][0]["content"])
    assert END not in rendered


def test_text_that_the_answer_continues_keeps_its_end() -> None:
    """With `continue_final_message` no text follows the last message."""
    body = {"messages": [{"role": "assistant", "content": "Here it is: <"}], "continue_final_message": True}
    assert neutralize_special_tokens(ROUTES["/v1/chat/completions"], body, SPECIAL) == body
    body["messages"] = [{"role": "assistant", "content": f"a {END}"}]
    assert END not in json.dumps(neutralize_special_tokens(ROUTES["/v1/chat/completions"], body, SPECIAL))


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        ([0], "prompt[0]"),
        ([5, 1], "prompt[1]"),
        ([1, 5, 0], "prompt[2]"),
        ([[5], [1, 7, 1]], "prompt[1][2]"),
    ],
)
def test_special_tokens_among_token_ids_are_refused_by_name(prompt: list[Any], param: str) -> None:
    """The error gives index, id and text. Only the tokenizer's own first token may come first."""
    with pytest.raises(FieldNotAllowed, match=r"is the special token '<\|") as refused:
        neutralize_special_tokens(ROUTES["/v1/completions"], {"prompt": prompt}, SPECIAL)
    assert refused.value.param == param


@pytest.mark.parametrize(
    "prompt", [[0.0], [False], [[5], ["0"]], [[5, 0.0]], [5, "0"], ["a", 0], [[5], 0], [[[0]]], {"a": 0}, 0]
)
def test_values_the_engine_would_read_as_token_ids_are_refused(prompt: Any) -> None:
    """The engine's parser turns 0.0, false and "0" into token 0; only integers pass."""
    with pytest.raises(InvalidRequest, match="prompt"):
        neutralize_special_tokens(ROUTES["/v1/completions"], {"prompt": prompt}, SPECIAL)


@pytest.mark.parametrize("prompt", ["x", ["x", "y"], [1, 5, 7], [[1, 5], [7]], []])
def test_texts_and_ordinary_token_ids_pass(prompt: Any) -> None:
    """OpenAI's four kinds of prompt."""
    assert neutralize_special_tokens(ROUTES["/v1/completions"], {"prompt": prompt}, SPECIAL) == {
        "prompt": prompt
    }


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages", "/tokenize"])
@pytest.mark.parametrize("role", ["end", "|end|", "assistant\n", ["user"], {"a": 1}, 7, "User"])
def test_role_that_no_template_knows_is_refused(path: str, role: Any) -> None:
    """Templates build special tokens from roles, so an unknown role could spell one."""
    name = "input" if path == "/v1/responses" else "messages"
    with pytest.raises(Refusal, match=rf"{name}\[1\].role") as refused:
        neutralize_special_tokens(ROUTES[path], {name: [{"role": "user"}, {"role": role}]}, SPECIAL)
    assert refused.value.status == 400


def test_field_without_a_reason_cannot_be_declared() -> None:
    """The field reference gives a reason for every field."""
    with pytest.raises(ValueError, match="reason"):
        Field("  ")


async def test_engine_gets_neutralized_text_on_every_kind_of_route(start: Start, engine: FakeEngine) -> None:
    """Generating and counting routes, and token ids, which are refused before the engine is called."""
    front = await start("calm")
    await front.chat(messages=[{"role": "user", "content": END}])
    assert engine.seen[-1]["messages"][0]["content"] == INERT
    async with front.public.post("/tokenize", json={"model": "tiny-model", "prompt": END}) as answer:
        assert answer.status == 200
    assert engine.plain[-1]["prompt"] == INERT
    body = {"model": "tiny-model", "prompt": [[5], [5, 0]]}
    async with front.public.post("/v1/completions", json=body) as answer:
        assert (answer.status, (await answer.json())["error"]["param"]) == (400, "prompt[1][1]")
    assert len(engine.seen) == 1


@pytest.mark.parametrize(
    ("special", "why"),
    [
        (None, "does not list the tokenizer's special tokens"),
        (SpecialTokenList(ids={END: 0}, fault="it folds"), "it folds"),
        (SpecialTokenList.model_construct(ids=["x"]), "malformed"),  # type: ignore[arg-type]
    ],
)
async def test_engine_that_lists_no_special_tokens_serves_nobody(
    start: Start, engine: FakeEngine, special: SpecialTokenList | None, why: str
) -> None:
    """An older plugin, or a tokenizer whose special tokens cannot be neutralized, is not proven; the reason
    is given."""
    engine.special = special
    front = await start("calm", wait=False)
    task = front.apps.engine_loop.task
    await asyncio.wait({task}, timeout=10)
    with pytest.raises(EngineError, match=why):
        task.result()
    status, _, answer = await front.chat()
    assert (status, answer["error"]["code"]) == (503, "engine_not_ready")
    assert not await front.engine_ready()
