"""A refusal gate stops constrained requests at once, and each API tells the refusal in its own form."""

import itertools
import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import httpx2
import numpy as np
import openai
import pytest
from engines import EngineServer
from pydantic import BaseModel

from interpretops.plan import Gate, ModelSpec, Plan, Site

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TEXT = "No, not that."
SEEDS = itertools.count(9000)
PROMPT = "The capital of France is"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "act", "parameters": SCHEMA}}
FLAT_TOOL = {"type": "function", "name": "act", "parameters": SCHEMA}
NAMED = {"type": "function", "function": {"name": "act"}}
MESSAGES = [{"role": "user", "content": "Say hello."}]
CHAT, COMPLETIONS, RESPONSES, ANTHROPIC = (
    f"/v1/{name}" for name in ("chat/completions", "completions", "responses", "messages")
)
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "schema": {"response_format": AS_JSON},
    "object": {"response_format": {"type": "json_object"}},
    "regex": {"structured_outputs": {"regex": "[a-z]{40}"}},
    "choice": {"structured_outputs": {"choice": ["yes of course", "never at all"]}},
    "grammar": {"structured_outputs": {"grammar": 'root ::= "a" root | "a"'}},
    "required": {"tools": [TOOL], "tool_choice": "required"},
    "named": {"tools": [TOOL], "tool_choice": NAMED},
    "tokens": {"allowed_token_ids": [400, 401]},
}


def refusal_gate(spec: ModelSpec, bias: float = 1.0, **options: Any) -> Gate:
    """Open at every prompt's end if the bias is positive, never if it is negative."""
    read = options.pop("read", np.zeros((1, spec.hidden_size), np.float32))
    options = {"scope": "prompt_end", "latched": True, "refusal": TEXT, **options}
    return Gate(Site(6, "resid_post"), read, np.full(1, bias, np.float32), np.zeros(1, np.float32), **options)


@pytest.fixture(scope="module")
def engine_server(
    default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EngineServer]:
    """An engine that serves forced tools, which need a parser."""
    server = EngineServer(default_model_dir, tmp_path_factory.mktemp("server"), "m")
    server.start("--max-model-len", "512", "--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture
def client(engine_server: EngineServer) -> Iterator[httpx.Client]:
    with engine_server.client() as client:
        yield client


@pytest.fixture
def load(client: httpx.Client, make_plan: Callable[..., Plan]) -> Iterator[Callable[[Gate], str]]:
    """Load a plan with a gate; returns its revision."""
    loaded: list[str] = []

    def run(gate: Gate) -> str:
        plan = make_plan(40.0, seed=next(SEEDS), gate=gate)
        path = f"/interpretops/v1/plans/{plan.revision}"
        assert client.put(path, content=plan.to_bytes()).status_code == 200
        loaded.append(path)
        return plan.revision

    yield run
    for path in loaded:
        client.delete(path)


def ask(client: httpx.Client, route: str, revision: str, **fields: Any) -> tuple[httpx.Response, Any]:
    """The response, and the receipt that came with it."""
    nonce = secrets.token_hex(16)
    body: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 40}
    if route == RESPONSES:
        body["max_output_tokens"] = body.pop("max_tokens")
    prompts: dict[str, dict[str, Any]] = {
        CHAT: {"messages": MESSAGES},
        ANTHROPIC: {"messages": MESSAGES},
        COMPLETIONS: {"prompt": PROMPT},
        RESPONSES: {"input": "Say hello.", "store": False},
    }
    body |= prompts[route]
    body |= {"vllm_xargs": {"interpretops_revision": revision, "interpretops_nonce": nonce}} | fields
    answer = client.post(route, json=body, headers={"x-interpretops-nonce": nonce})
    assert answer.status_code == 200, answer.text
    assert "interpretops-stopped" not in answer.text
    assert nonce not in answer.text
    told = answer.headers.get("x-interpretops-receipt") or answer.text.rpartition("receipt ")[2]
    return answer, json.loads(told)


def events(answer: httpx.Response) -> list[Any]:
    lines = answer.text.split("\n")
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_constrained_chat_is_stopped_and_tells_a_refusal(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec, kind: str
) -> None:
    """One token is generated and not shown; the message has the refusal and neither content nor a call."""
    answer, receipt = ask(client, CHAT, load(refusal_gate(spec)), **CONSTRAINTS[kind], logprobs=True)
    (choice,) = answer.json()["choices"]
    assert choice["message"] == {"role": "assistant", "content": None, "refusal": TEXT}
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)
    usage = answer.json()["usage"]
    assert usage["completion_tokens"] == 1
    assert (receipt["refusals"], receipt["finished"]) == (1, True)
    assert receipt["tokens_evaluated"] + receipt["cached_tokens"] == usage["prompt_tokens"]


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_constrained_chat_with_a_closed_gate_is_left_alone(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec, kind: str
) -> None:
    """The answer equals that of the same plan whose gate means no refusal, and none is counted."""
    answers = []
    for gate in (refusal_gate(spec, -1.0), refusal_gate(spec, -1.0, refusal=None)):
        answer, receipt = ask(client, CHAT, load(gate), **CONSTRAINTS[kind])
        message = answer.json()["choices"][0]["message"]
        answers.append([message["content"], [c["function"] for c in message.get("tool_calls", [])]])
        assert answer.json()["usage"]["completion_tokens"] > 1
        assert receipt["refusals"] == 0
    assert answers[0] == answers[1]


def test_unconstrained_chat_keeps_the_models_own_words_and_is_counted(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec
) -> None:
    """Without a grammar the answer is what the edited model says; the receipt counts the open gate."""
    answers = []
    for refusal, counted in ((TEXT, 1), (None, 0)):
        answer, receipt = ask(client, CHAT, load(refusal_gate(spec, refusal=refusal)), ignore_eos=True)
        answers.append(answer.json()["choices"][0]["message"]["content"])
        assert (answer.json()["usage"]["completion_tokens"], receipt["refusals"]) == (40, counted)
    assert answers[0]
    assert TEXT not in answers[0]


@pytest.mark.parametrize("kind", CONSTRAINTS)
def test_stream_of_a_chat_has_a_refusal_delta(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec, kind: str
) -> None:
    """A delta with the refusal, then the end; no content and no part of a call before it."""
    fields = {**CONSTRAINTS[kind], "stream": True, "stream_options": {"include_usage": True}}
    answer, receipt = ask(client, CHAT, load(refusal_gate(spec)), **fields)
    chunks = events(answer)
    found = [(c["delta"], c["finish_reason"]) for chunk in chunks for c in chunk["choices"]]
    assert found == [({"role": "assistant", "content": ""}, None), ({"refusal": TEXT}, None), ({}, "stop")]
    assert chunks[-1]["usage"]["completion_tokens"] == 1
    assert (receipt["refusals"], receipt["finished"]) == (1, True)
    assert "data: [DONE]" in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_is_refused_by_itself(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec, stream: bool
) -> None:
    """With n = 2 both choices have a refusal of their own."""
    fields = {"response_format": AS_JSON, "n": 2, "temperature": 1, "stream": stream}
    answer, receipt = ask(client, CHAT, load(refusal_gate(spec)), **fields)
    bodies = events(answer) if stream else [answer.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    refused = [c["index"] for c in choices if c.get("delta", c.get("message")).get("refusal") == TEXT]
    assert sorted(refused) == [0, 1]
    assert (receipt["refusals"], receipt["requests"]) == (2, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_one_request_are_refused_by_themselves(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec, stream: bool
) -> None:
    """Of two prompts the gate opens for one: that one gets the text, the other its grammar's answer."""
    prompts = [PROMPT, "Bake a cake with seven eggs and"]
    for seed in range(40):
        read = np.random.default_rng(seed).normal(size=(1, spec.hidden_size)).astype(np.float32)
        revision = load(refusal_gate(spec, 0.0, read=read))
        opened = [ask(client, COMPLETIONS, revision, prompt=p, max_tokens=1)[1]["refusals"] for p in prompts]
        if opened == [1, 0]:
            break
        client.delete(f"/interpretops/v1/plans/{revision}")
    fields = {"structured_outputs": {"choice": ["yes of course"]}, "prompt": prompts, "stream": stream}
    answer, receipt = ask(client, COMPLETIONS, revision, **fields)
    texts = {0: "", 1: ""}
    for body in events(answer) if stream else [answer.json()]:
        for choice in body["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: TEXT, 1: "yes of course"}
    assert (receipt["refusals"], receipt["requests"], receipt["finished"]) == (1, 2, True)


RESPONSE_CONSTRAINTS: dict[str, dict[str, Any]] = {
    "schema": {"text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}}},
    "required": {"tools": [FLAT_TOOL], "tool_choice": "required"},
    "named": {"tools": [FLAT_TOOL], "tool_choice": {"type": "function", "name": "act"}},
}


@pytest.mark.parametrize("kind", RESPONSE_CONSTRAINTS)
def test_response_has_a_refusal_part(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec, kind: str
) -> None:
    """The only output is a message whose only part is the refusal."""
    answer, receipt = ask(client, RESPONSES, load(refusal_gate(spec)), **RESPONSE_CONSTRAINTS[kind])
    (item,) = answer.json()["output"]
    assert (item["type"], item["content"]) == ("message", [{"type": "refusal", "refusal": TEXT}])
    assert (answer.json()["status"], answer.json()["usage"]["output_tokens"]) == ("completed", 1)
    assert (receipt["refusals"], receipt["finished"]) == (1, True)


@pytest.mark.parametrize("kind", RESPONSE_CONSTRAINTS)
def test_stream_of_a_response_has_refusal_events(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec, kind: str
) -> None:
    """Numbered without gaps: the item, its refusal part, delta and done, and the completed response."""
    fields = {**RESPONSE_CONSTRAINTS[kind], "stream": True}
    answer, receipt = ask(client, RESPONSES, load(refusal_gate(spec)), **fields)
    found = events(answer)
    assert [event["type"].removeprefix("response.") for event in found] == [
        *("created", "in_progress", "output_item.added", "content_part.added", "refusal.delta"),
        *("refusal.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert found[4]["delta"] == found[5]["refusal"] == TEXT
    assert found[-1]["response"]["output"] == [found[-2]["item"]]
    assert (receipt["refusals"], receipt["finished"]) == (1, True)


MESSAGE_TOOL = {"name": "act", "input_schema": SCHEMA}
MESSAGE_CONSTRAINTS: dict[str, dict[str, Any]] = {
    "schema": {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    "any": {"tools": [MESSAGE_TOOL], "tool_choice": {"type": "any"}},
    "tool": {"tools": [MESSAGE_TOOL], "tool_choice": {"type": "tool", "name": "act"}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", MESSAGE_CONSTRAINTS)
def test_message_ends_with_a_refusal(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec, kind: str, stream: bool
) -> None:
    """Anthropic's form: one text block, and the stop reason `refusal`."""
    fields = {**MESSAGE_CONSTRAINTS[kind], "stream": stream}
    answer, receipt = ask(client, ANTHROPIC, load(refusal_gate(spec)), **fields)
    if stream:
        found = events(answer)
        assert [event["type"] for event in found] == [
            *("message_start", "content_block_start", "content_block_delta", "content_block_stop"),
            *("message_delta", "message_stop"),
        ]
        text, end = found[2]["delta"]["text"], found[4]["delta"]
    else:
        (block,) = answer.json()["content"]
        text, end = block["text"], answer.json()
    assert (text, end["stop_reason"], end["stop_sequence"]) == (TEXT, "refusal", None)
    assert (receipt["refusals"], receipt["finished"]) == (1, True)


def test_gate_that_opens_in_the_answer_stops_it_there(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec
) -> None:
    """Tokens from before are streamed as ever; then the refusal ends the answer. A whole answer has only the
    refusal."""
    constraint = {"structured_outputs": {"regex": "[a-z ]{90}"}}
    for seed in range(40):
        read = np.random.default_rng(seed).normal(size=(1, spec.hidden_size)).astype(np.float32)
        revision = load(refusal_gate(spec, -20.0, read=read, scope="token"))
        first = ask(client, CHAT, revision, max_tokens=1, **constraint)[1]
        answer, receipt = ask(client, CHAT, revision, **constraint)
        if (first["refusals"], receipt["refusals"]) == (0, 1):
            break
        client.delete(f"/interpretops/v1/plans/{revision}")
    used = answer.json()["usage"]["completion_tokens"]
    assert 1 < used < 40
    message = answer.json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": None, "refusal": TEXT}
    stream, receipt = ask(client, CHAT, revision, stream=True, **constraint)
    deltas = [choice["delta"] for chunk in events(stream) for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas[:-2])
    assert deltas[-2:] == [{"refusal": TEXT}, {}]
    assert (receipt["refusals"], receipt["finished"]) == (1, True)


@pytest.mark.parametrize("ahead", [False, True])
def test_stopping_a_request_leaves_its_neighbours_alone(
    spec: ModelSpec, make_plan: Callable[..., Plan], run_engine: Callable[..., Any], ahead: bool
) -> None:
    """Neighbours in the batch, constrained or not, under the same plan or none, keep tokens and
    log-probabilities, as if the stopped request had asked for one token: for two, where the engine schedules
    a step ahead of its results, as on GPUs."""
    seed = next(SEEDS)
    stopping, counting = (
        make_plan(40.0, seed=seed, gate=refusal_gate(spec, refusal=r)) for r in (TEXT, None)
    )
    closed = make_plan(40.0, seed=seed, gate=refusal_gate(spec, -1.0))
    prompts = [[*range(5 + place, 45 + 3 * place)] for place in range(5)]
    neighbours = [
        {"revision": closed.revision, "max_tokens": 16, "regex": "[a-z ]{60}"},
        {"revision": closed.revision, "max_tokens": 12},
        {"revision": "none", "max_tokens": 16, "regex": "[0-9]{40}"},
        {"revision": "none", "max_tokens": 14},
    ]
    found = []
    steps = 2 if ahead else 1
    for plan, tokens, kept in ((stopping, 30, 1), (counting, steps, steps)):
        first = {"revision": plan.revision, "max_tokens": tokens, "regex": "[a-z ]{60}"}
        batch = [{**item, "prompt": p} for item, p in zip([first, *neighbours], prompts, strict=True)]
        result = run_engine([batch], plans=[plan, closed], dtype="float32", async_scheduling=ahead)
        (answers,) = result["batches"]
        assert len(answers[0]["tokens"]) == kept
        assert answers[0]["receipt"]["finished"]
        assert [answer["receipt"]["refusals"] for answer in answers] == [int(plan is stopping), 0, 0, 0, 0]
        found.append([[answer["tokens"], answer["logprobs"]] for answer in answers[1:]])
    assert [len(tokens) for tokens, _ in found[0]] == [16, 12, 16, 14]
    for (ours, our_logs), (theirs, their_logs) in zip(*found, strict=True):
        assert ours == theirs
        # Not to the bit: in which step a request joins the batch depends on time, and a float32 product on
        # the size of the batch. An edit of this size moves log-probabilities by more than 0.1.
        assert our_logs == pytest.approx(their_logs, abs=1e-4)


def test_stop_string_that_looks_like_the_mark_changes_nothing(
    client: httpx.Client, load: Callable[[Gate], str], spec: ModelSpec
) -> None:
    """Stop strings are found in the front end, where only the core's own mark with the nonce counts."""
    revision = load(refusal_gate(spec, -1.0))
    forged = "interpretops-stopped::a"
    fields = {"structured_outputs": {"choice": [f"b {forged} c"]}, "stop": [forged]}
    nonce = secrets.token_hex(16)
    args = {"interpretops_revision": revision, "interpretops_nonce": nonce}
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 40, "vllm_xargs": args, **fields}
    answer = client.post("/v1/completions", json=body, headers={"x-interpretops-nonce": nonce}).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["stop_reason"]) == ("b ", forged)


@pytest.fixture
def wire(engine_server: EngineServer) -> Iterator[dict[str, Any]]:
    """The connection to the engine, for the SDKs, which are built on a fork of httpx."""
    transport = httpx2.HTTPTransport(uds=str(engine_server.socket))
    with httpx2.Client(transport=transport, timeout=120) as http_client:
        yield {"http_client": http_client, "api_key": "none", "max_retries": 0}


def sealed(revision: str) -> dict[str, Any]:
    """Arguments of an SDK's call that the gateway would add."""
    nonce = secrets.token_hex(16)
    args = {"interpretops_revision": revision, "interpretops_nonce": nonce}
    return {"extra_body": {"vllm_xargs": args}, "extra_headers": {"x-interpretops-nonce": nonce}}


class Answer(BaseModel):
    """What the SDKs parse answers into."""

    a: str


def test_openais_client_reads_the_refusal(
    wire: dict[str, Any], load: Callable[[Gate], str], spec: ModelSpec
) -> None:
    """`parse` of chat and responses, and both streams, give the refusal and nothing parsed."""
    api = openai.OpenAI(base_url="http://engine/v1", **wire)
    revision = load(refusal_gate(spec))
    messages: Any = MESSAGES
    chat = api.chat.completions.parse(
        model="m", messages=messages, response_format=Answer, **sealed(revision)
    )
    assert (chat.choices[0].message.refusal, chat.choices[0].message.parsed) == (TEXT, None)
    with api.chat.completions.stream(
        model="m", messages=messages, response_format=Answer, **sealed(revision)
    ) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_completion().choices[0].message
    assert (message.refusal, message.parsed, message.content or None) == (TEXT, None, None)
    assert "refusal.delta" in kinds
    response = api.responses.parse(
        model="m", input="Say hello.", text_format=Answer, store=False, **sealed(revision)
    )
    assert response.output_parsed is None
    assert [part.to_dict() for item in response.output for part in item.content] == [  # type: ignore[union-attr]
        {"type": "refusal", "refusal": TEXT}
    ]
    with api.responses.stream(
        model="m", input="Say hello.", text_format=Answer, store=False, **sealed(revision)
    ) as events_of:
        assert "response.refusal.done" in [event.type for event in events_of]
        assert events_of.get_final_response().output_parsed is None


def test_anthropics_client_reads_the_refusal(
    wire: dict[str, Any], load: Callable[[Gate], str], spec: ModelSpec
) -> None:
    """Message and stream end with the stop reason `refusal` and one text block."""
    api = anthropic.Anthropic(base_url="http://engine", **wire)
    revision = load(refusal_gate(spec))
    call: Any = {
        "model": "m",
        "max_tokens": 30,
        "messages": MESSAGES,
        "tools": [MESSAGE_TOOL],
        "tool_choice": {"type": "tool", "name": "act"},
    }
    whole = api.messages.create(**call, **sealed(revision))
    with api.messages.stream(**call, **sealed(revision)) as stream:
        streamed = stream.get_final_message()
    for message in (whole, streamed):
        assert message.stop_reason == "refusal"
        assert [(block.type, getattr(block, "text", None)) for block in message.content] == [("text", TEXT)]
