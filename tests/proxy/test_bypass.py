"""No way past a mandatory policy: every route, streamed or not, whatever a client writes and wherever."""

import itertools
import json
import typing
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from multidict import CIMultiDict
from running_gateway import Start

from interpretops.settings.access import Route
from proxy.openai_api.routes import ROUTES, UNGUARDED

BINDINGS = [{"policy": "calm", "mode": "mandatory"}, {"policy": "*"}]
SEAL = {"interpretops_revision", "interpretops_nonce"}
NONE = {"interpretops_revision": "none"}
CONTENT = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"input": "hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
}
WAYS = {
    "nothing": {},
    "header none": {"headers": {"X-Steering-Policy": "none"}},
    "header other": {"headers": {"X-Steering-Policy": "other"}},
    "header case": {"headers": {"x-STEERING-policy": "none"}},
    "header unicode": {"headers": {"X-Steering-Policy": "n\uff4fne"}},
    "header list": {"headers": {"X-Steering-Policy": "calm, none"}},
    "header underscore": {"headers": {"X_Steering_Policy": "none"}},
    "header twice": {"headers": [("X-Steering-Policy", "calm"), ("x-steering-policy", "none")]},
    "alias none": {"fields": {"model": "tiny-model+none"}},
    "alias other": {"fields": {"model": "tiny-model+other"}},
    "alias twice": {"fields": {"model": "tiny-model+calm+none"}},
    "alias case": {"fields": {"model": "Tiny-Model+none"}},
    "alias unicode": {"fields": {"model": "tiny-m\u043edel"}},
    "alias wide plus": {"fields": {"model": "tiny-model\uff0bnone"}},
    "alias invisible": {"fields": {"model": "tiny-model\u200b"}},
    "model a list": {"fields": {"model": ["tiny-model", "none"]}},
    "xargs": {"fields": {"vllm_xargs": NONE}},
    "xargs case": {"fields": {"VLLM_XARGS": NONE}},
    "xargs unicode": {"fields": {"vllm\uff3fxargs": NONE}},
    "xargs space": {"fields": {"vllm_xargs ": NONE}},
    "xargs null": {"fields": {"vllm_xargs": None}},
    "extra_args": {"fields": {"extra_args": NONE}},
    "extra_body": {"fields": {"extra_body": {"vllm_xargs": NONE}}},
    "revision": {"fields": NONE},
    "kv transfer": {"fields": {"kv_transfer_params": {"interpretops": {"revision": None}}}},
    "cache salt": {"fields": {"cache_salt": "r" + "0" * 64}},
    "own template": {"fields": {"chat_template": "{{ messages }}"}},
    "stored answer": {"fields": {"previous_response_id": "resp_1"}},
    "background": {"fields": {"background": True}},
    "internal header": {"headers": {"X-Interpretops-Revision": "none"}},
    "method override": {"headers": {"X-HTTP-Method-Override": "GET"}},
    "forwarded path": {"headers": {"X-Original-URL": "/v1/embeddings", "X-Rewrite-URL": "/pooling"}},
    "duplicate key": {"tail": ', "model": "tiny-model+none"'},
    "duplicate xargs": {"tail": ', "vllm_xargs": {}, "vllm_xargs": {"interpretops_revision": "none"}'},
    "escaped duplicate": {"tail": ', "\\u006dodel": "tiny-model+none"'},
    "escaped xargs": {"tail": ', "vllm\\u005fxargs": {"interpretops_revision": "none"}'},
    "nested in metadata": {"fields": {"metadata": {"vllm_xargs": NONE}}},
    "nested in tools": {
        "fields": {
            "tools": [{"type": "function", "vllm_xargs": NONE, "function": {"name": "f", "vllm_xargs": NONE}}]
        }
    },
    "tools that reach out": {"fields": {"tools": [{"type": "mcp", "server_url": "http://127.0.0.1/"}]}},
    "query": {"query": "?model=tiny-model%2Bnone&policy=none&vllm_xargs=none"},
}


def check(answer: Any, text: str, steered: str) -> None:
    """The answer must be steered, or an error in OpenAI's format."""
    assert answer.status in (200, 400, 403, 404), text
    if answer.status == 200:
        assert steered.startswith("calm@"), text
    else:
        assert answer.headers["x-should-retry"] == "false"
        assert json.loads(text)["error"]["code"]


@pytest.mark.parametrize("route", CONTENT)
@pytest.mark.parametrize("stream", [False, True])
async def test_no_way_past_a_mandatory_policy(
    start: Start, engine: FakeEngine, route: str, stream: bool
) -> None:
    """No answer to any attempt is unsteered, and the engine runs nothing under another revision."""
    front = await start("calm", "other", bindings=BINDINGS)
    active = front.apps.gateway.catalogue.entries["calm"].active.revision
    steered = 0
    for way, tried in WAYS.items():
        engine.seen.clear()
        body = json.dumps(
            {"model": "tiny-model", "stream": stream, **CONTENT[route], **tried.get("fields", {})}
        )
        body = body[:-1] + tried.get("tail", "") + "}"
        given = CIMultiDict(tried.get("headers", {}))
        given["Content-Type"] = "application/json"
        path = route + tried.get("query", "")
        async with front.public.post(path, data=body.encode(), headers=given) as answer:
            text = await answer.text()
            check(answer, text, answer.headers.get("X-Steering-Policy", ""))
            if answer.status == 200:
                steered += 1
                proof = text if stream else answer.headers["X-Steering-Receipt"]
                assert active in proof, way
        asked = [seen["vllm_xargs"]["interpretops_revision"] for seen in engine.seen]
        assert set(asked) <= {active}, way
        assert all(
            seen["vllm_xargs"].keys() == {"interpretops_revision", "interpretops_nonce"}
            for seen in engine.seen
        )
        assert way not in ("nothing", "query") or asked
    assert steered >= 3


def test_matrix_knows_every_route_on_which_the_model_runs() -> None:
    """A new route must be added to the matrix above, or to the settings."""
    assert {path for path, route in ROUTES.items() if route.generates} == CONTENT.keys()
    assert set(ROUTES) == set(typing.get_args(Route))
    assert not set(ROUTES) & set(UNGUARDED)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {"prompt": "hi"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/detokenize", {"tokens": [1, 2]}),
        ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}),
    ],
)
async def test_routes_without_a_model_run_generate_nothing(
    start: Start, engine: FakeEngine, path: str, body: dict[str, Any]
) -> None:
    """Counting tokens needs no policy, and cannot be made to generate."""
    front = await start("calm", bindings=BINDINGS)
    async with front.public.post(path, json={"model": "tiny-model", **body}) as answer:
        assert (answer.status, (await answer.json())["count"]) == (200, 3)
        assert "X-Steering-Policy" not in answer.headers
    for extra in ({"max_tokens": 4}, {"stream": True}, {"vllm_xargs": NONE}):
        async with front.public.post(path, json={"model": "tiny-model", **body, **extra}) as answer:
            assert answer.status == 400
    assert engine.seen == []
    assert engine.plain == [{"model": "tiny-model", **body}]


async def test_unproven_engine_counts_no_tokens_either(start: Start, engine: FakeEngine) -> None:
    """On no route does a restarted engine's answer reach anyone before it is proven."""
    front = await start("calm")
    await engine.restart()
    async with front.public.post("/tokenize", json={"model": "tiny-model", "prompt": "hi"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (503, "engine_not_ready")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        *(("POST", path.replace("{id}", "resp_1"), 403, "route_not_guarded") for path in UNGUARDED),
        ("GET", "/v1/responses/resp_1", 403, "route_not_guarded"),
        ("POST", "/interpretops/v1/selftest", 404, "unknown_route"),
        ("PUT", "/interpretops/v1/plans/" + "0" * 64, 404, "unknown_route"),
        ("POST", "/v1/load_lora_adapter", 404, "unknown_route"),
        ("POST", "/V1/chat/completions", 404, "unknown_route"),
        ("POST", "/v1/chat/completions/", 404, "unknown_route"),
        ("POST", "/v1//chat/completions", 404, "unknown_route"),
        ("POST", "/v1/./chat/completions/..", 404, "unknown_route"),
        ("POST", "/admin/reload", 404, "unknown_route"),
        ("GET", "/metrics", 404, "unknown_route"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/messages", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/completions", 405, "method_not_allowed"),
    ],
)
async def test_all_else_is_refused_in_openai_shape(
    start: Start, engine: FakeEngine, method: str, path: str, status: int, code: str
) -> None:
    """Default deny: other engine routes, plugin routes and admin routes are not available here."""
    front = await start("calm")
    async with front.public.request(method, path, json={"model": "tiny-model", "input": "hi"}) as answer:
        body = await answer.json()
    assert (answer.status, body["error"]["code"]) == (status, code)
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert answer.headers["x-should-retry"] == "false"
    assert answer.headers["X-Request-Id"].startswith("req_")
    assert (engine.seen, engine.plain) == ([], [])


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        ),
        ("/v1/responses", {"input": [{"type": "function_call_output", "output": [{"type": "input_file"}]}]}),
        ("/v1/responses", {"input": {"role": "user"}}),
        ("/v1/responses", {"input": "hi", "tools": [{"type": "web_search"}]}),
        ("/v1/responses", {"input": "hi", "tools": {"type": "function"}}),
        ("/v1/responses", {"input": "hi", "prompt": {"id": "x"}}),
        ("/v1/messages", {"system": [{"type": "image", "source": {"url": "http://x"}}]}),
        (
            "/v1/messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "content": [{"type": "image"}]}]}
                ]
            },
        ),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "document"}]}]}),
        ("/v1/messages", {"mcp_servers": [{"url": "http://x"}]}),
    ],
)
async def test_content_that_makes_the_engine_fetch_is_refused(
    start: Start, engine: FakeEngine, route: str, fields: dict[str, Any]
) -> None:
    """No URL, stored item or remote tool of a client is ever followed."""
    front = await start()
    body = {"model": "tiny-model", **CONTENT[route], **fields}
    async with front.public.post(route, json=body) as answer:
        reported = await answer.json()
    assert (answer.status, reported["error"]["type"]) == (400, "invalid_request_error")
    assert (reported.get("type") == "error") == (route == "/v1/messages")
    assert engine.seen == []


async def test_answers_are_never_stored_by_the_engine(start: Start, engine: FakeEngine) -> None:
    """Whatever the client says, the engine is told not to store the response."""
    front = await start()
    body = {"model": "tiny-model", "input": "hi", "store": True}
    async with front.public.post("/v1/responses", json=body) as answer:
        assert answer.status == 200
    assert engine.seen[0]["store"] is False


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("trick", ["", "wrong_revision", "no_done", "dies"])
async def test_named_streams_end_only_when_proven(
    start: Start, engine: FakeEngine, route: str, trick: str
) -> None:
    """The end event follows the receipt; without proof, an error event is sent instead."""
    front = await start("calm")
    engine.trick = trick
    body = {"model": "tiny-model+calm", "stream": True, **CONTENT[route]}
    async with front.public.post(route, json=body) as answer:
        text = await answer.text()
    *before, last = [event for event in text.split("\n\n") if event]
    end = ROUTES[route].end.decode()
    if trick:
        assert last.startswith("event: error\n")
        assert json.loads(last.partition("data: ")[2])["error"]["code"] in ("receipt_failed", "engine_failed")
        assert end not in text
    else:
        assert before[-1].startswith(": steering-receipt {")
        assert last.startswith(end)


async def test_tenants_share_no_cache(start: Start, engine: FakeEngine, tmp_path: Path) -> None:
    """One tenant never gets prefix-cache hits on another's prompts, whatever salt it sends."""
    from interpretops.records.api_keys import make_key, write_keys

    made = {name: make_key(tenant=name) for name in ("a", "b")}
    write_keys(tmp_path / "keys.yaml", [kept for _, kept in made.values()])
    tenants = [{"id": name} for name in made]
    front = await start(tenants=tenants, **{"paths.keys": tmp_path / "keys.yaml"})
    for (name, (key, _)), salt in itertools.product(made.items(), ({}, {"cache_salt": "s"})):
        status, _, _ = await front.chat(headers={"Authorization": f"Bearer {key}"}, **salt)
        assert status == 200, name
    salts = [seen["cache_salt"] for seen in engine.seen]
    assert len(set(salts)) == 4
    assert all(len(salt) <= 64 for salt in salts)
