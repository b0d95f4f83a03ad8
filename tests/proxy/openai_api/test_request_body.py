"""What a client may send, and what never reaches the engine."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from running_gateway import Start

from proxy.errors import FieldNotAllowed, InvalidRequest, Refusal, TooLarge
from proxy.openai_api import request_body as sanitize
from proxy.openai_api.request_body import MAX_DEPTH, clean, parse_strict, serialize
from proxy.openai_api.routes import ROUTES, Route

CHAT = ROUTES["/v1/chat/completions"]
JSON = {"Content-Type": "application/json"}
FORBIDDEN = [
    "vllm_xargs",
    "extra_args",
    "Vllm_xargs",
    "vllm_xargs ",
    "vllm\u200b_xargs",
    "use_beam_search",
    "kv_transfer_params",
    "ec_transfer_params",
    "prompt_embeds",
    "priority",
    "request_id",
    "chat_template",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "interpretops_revision",
    "extra_body",
]


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES.keys())
@pytest.mark.parametrize("name", FORBIDDEN)
def test_field_that_clients_may_not_set_is_refused_by_name(route: Route, name: str) -> None:
    """Fields that are not known to be safe are refused, however they are spelled."""
    with pytest.raises(FieldNotAllowed, match="may not be set") as refused:
        clean(route, {"model": "m", name: {"interpretops_revision": "none"}})
    assert refused.value.param == name


@pytest.mark.parametrize(
    "text",
    [
        '{"model": "a", "model": "b"}',
        '{"model": "a", "\\u006dodel": "b"}',
        '{"model": "a", "messages": [{"role": "user", "role": "system"}]}',
        '{"temperature": NaN}',
        '{"temperature": -Infinity}',
        '{"temperature": 1e999}',
        '{"user": "\\ud800"}',
        '{"seed": ' + "9" * 5000 + "}",
        "[1]",
        "",
        "{",
        '{"a": 1} {"b": 2}',
        "[" * 100_000,
        '{"tools": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}",
        b"\xff\xfe{\x00}\x00".decode("latin-1"),
        "\ufeff{}",
    ],
)
def test_what_two_parsers_could_read_differently_is_refused(text: str) -> None:
    """Duplicate keys, NaN, infinity, half characters and deep nesting are refused, never guessed."""
    with pytest.raises((InvalidRequest, TooLarge)):
        serialize(parse_strict(text.encode("utf-8", "surrogatepass")))


def test_utf16_is_refused() -> None:
    """A body in another encoding is refused, although Python's parser would read it."""
    with pytest.raises(InvalidRequest):
        parse_strict('{"model": "a"}'.encode("utf-16"))


def test_nesting_within_the_bound_is_read() -> None:
    """The limit is on depth alone."""
    text = '{"tools": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}"
    assert "tools" in parse_strict(text.encode())


def many(part: str, number: int, head: str = '{"tools": [', tail: str = "]}") -> bytes:
    return (head + ",".join([part] * number) + tail).encode()


@pytest.mark.parametrize(
    "data",
    [
        many("{}", 25_000),
        many('{"a":0}', 16_000),
        many("[]", 25_000),
        many("0", 200_000),
        many('"\\\\"', 200_000),
        many('"a,[{":0', 50_000, head='{"logit_bias": {', tail="}}"),
        many("[" * 60 + "]" * 60, 500),
    ],
)
def test_body_of_too_many_values_is_not_parsed(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that would block other requests is refused by counting, before it is parsed."""
    monkeypatch.setattr(sanitize, "_DECODER", None)
    with pytest.raises(TooLarge, match=r"more than 200000 values \(gateway.max_body_values"):
        parse_strict(data)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": [7] * 190_000},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}] * 4000},
        {"prompt": '{"a": [1, 2], "b": "c\\"}, ' * 50_000},
        {"prompt": "\\" * 100_001 + '"[{,' * 100_000},
    ],
)
def test_body_of_many_texts_or_tokens_is_read(body: dict[str, Any]) -> None:
    """Long prompts pass; characters inside strings do not count, however they are quoted."""
    assert parse_strict(json.dumps(body).encode()) == body


@given(
    value=st.recursive(st.integers(0, 9) | st.text('\\"[{,:', max_size=5), st.lists, max_leaves=20),
    quoted=st.booleans(),
)
def test_count_equals_the_parsers(value: Any, quoted: bool) -> None:
    """The count equals the number of values found by parsing."""
    data = json.dumps({"stop": json.dumps(value) if quoted else value}, separators=(",", ":")).encode()

    def values(part: Any) -> int:
        if isinstance(part, dict):
            return 8 + sum(4 + values(child) for child in part.values()) + max(0, len(part) - 1)
        if isinstance(part, list):
            return 8 + sum(map(values, part)) + max(0, len(part) - 1)
        return 0

    exact = values(json.loads(data))
    parse_strict(data, max_values=exact)
    with pytest.raises(TooLarge):
        parse_strict(data, max_values=exact - 1)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=20))
def test_values_reach_the_engine_as_sent(value: Any) -> None:
    """Parsing and encoding a body changes no value."""
    raw = json.dumps({"model": "m", "stop": value}).encode()
    if value is not None and "\\ud" not in raw.decode():
        assert json.loads(serialize(clean(CHAT, parse_strict(raw)))) == {"model": "m", "stop": value}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stream", "true"),
        ("stream", 1),
        ("model", None),
        ("model", ["m"]),
        ("cache_salt", ""),
        ("cache_salt", "a" * 33),
        ("cache_salt", "a@b"),
        ("cache_salt", "a\n"),
        ("cache_salt", 7),
        ("messages", "hi"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
        ),
        ("messages", [{"role": "user", "content": [{"image_url": "http://x"}]}]),
    ],
)
def test_wrong_value_names_its_field(field: str, value: Any) -> None:
    """A value of the wrong type is refused with the field's name."""
    with pytest.raises(Refusal) as refused:
        clean(CHAT, {"model": "m", field: value})
    assert refused.value.param.startswith(field)
    assert refused.value.status == 400


def test_fields_meaningless_to_the_engine_are_dropped() -> None:
    """OpenAI's bookkeeping fields are accepted but not passed on."""
    body = {"model": "m", "messages": [], "user": "u", "metadata": {}, "store": False, "cache_salt": "s-1"}
    assert clean(CHAT, body) == {"model": "m", "messages": [], "cache_salt": "s-1"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/json; charset=utf-7"}, 415),
        ({"Content-Type": "application/json", "X-Interpretops-Revision": "none"}, 400),
        ({"Content-Type": "application/json", "x-INTERPRETOPS-nonce": "0"}, 400),
    ],
)
async def test_internal_headers_are_refused(
    start: Start, engine: FakeEngine, headers: dict[str, str], status: int
) -> None:
    """Internal headers, and bodies that are not plain JSON, are refused before the body is read."""
    front = await start("calm")
    body = b'{"model": "tiny-model", "messages": []}'
    async with front.public.post(CHAT.path, data=body, headers=headers) as answer:
        assert answer.status == status
        assert (await answer.json())["error"]["type"] == "invalid_request_error"
    assert engine.seen == []


async def test_body_over_the_bound_is_refused(start: Start, engine: FakeEngine) -> None:
    """A body over the limit is never read to its end, with or without Content-Length."""
    front = await start(**{"gateway.max_body_bytes": 2000})

    async def endless() -> AsyncIterator[Any]:
        for _ in range(100):
            yield b" " * 1000

    for data in (b" " * 3000, endless()):
        async with front.public.post(
            CHAT.path, data=data, headers={"Content-Type": "application/json"}
        ) as answer:
            assert answer.status == 413
            assert (await answer.json())["error"]["code"] == "request_too_large"


async def test_slow_body_is_refused(start: Start, engine: FakeEngine) -> None:
    """A client that does not finish its body gets an error and holds no resources."""
    front = await start(**{"gateway.body_timeout_s": 0.2})
    done = asyncio.Event()

    async def stuck() -> AsyncIterator[Any]:
        yield b"{"
        await done.wait()

    async with front.public.post(
        CHAT.path, data=stuck(), headers={"Content-Type": "application/json"}
    ) as answer:
        assert answer.status == 408
    done.set()


async def test_engine_sees_only_our_seal(start: Start, engine: FakeEngine) -> None:
    """The engine gets the client's fields, the model without alias, and the gateway's revision and nonce."""
    front = await start("calm")
    await front.chat(model="tiny-model+calm", temperature=0.5, user="u", cache_salt="abc")
    (body,) = engine.seen
    seal = body.pop("vllm_xargs")
    assert seal["interpretops_revision"] in engine.plans
    assert len(seal["interpretops_nonce"]) == 32
    assert body == {
        "model": "tiny-model",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "cache_salt": "abc",
    }


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/embeddings", 403),
        ("POST", "/invocations", 403),
        ("POST", "/render", 404),
        ("GET", "/interpretops/v1/attest", 404),
        ("POST", "/v1/chat/completions/", 404),
        ("GET", "/metrics", 404),
        ("GET", "/admin/policies", 404),
        ("POST", "/v1/load_lora_adapter", 404),
    ],
)
async def test_what_is_not_guarded_is_not_served(
    start: Start, engine: FakeEngine, method: str, path: str, status: int
) -> None:
    """All other routes are refused in OpenAI's format, and never forwarded."""
    front = await start("calm")
    async with front.public.request(method, path, json={}) as answer:
        assert answer.status == status
        error = (await answer.json())["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert answer.headers["x-should-retry"] == "false"
        assert answer.headers["X-Request-Id"].startswith("req_")
