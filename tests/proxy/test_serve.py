"""`mechctl serve` as users run it: the real engine, the official client, edits and crashes under load."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import openai
import psutil
import pytest

from proxy.openai_api.routes import ROUTES

MECHCTL = [sys.executable, "-m", "mechctl.main"]
MODEL = "smollm2-135m-instruct"
PROMPT = [{"role": "user", "content": "What is the capital of France, and why is it famous?"}]
HEADS = """
meta: {{id: {name}}}
interventions:
  - {{type: head_scale, selector: {{layers: [12, 13, 14, 15], heads: [0, 1, 2, 3, 4]}}, scale: {scale}}}
"""

pytestmark = pytest.mark.engine


@dataclass
class Served:
    """A running gateway."""

    process: subprocess.Popen[str]
    url: str
    admin: str
    policies: Path

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0)

    def engine_processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine_process(self, part: str) -> psutil.Process:
        """The reaper, the API server it started, or the engine core that the server started."""
        (keeper,) = psutil.Process(self.process.pid).children()
        (server,) = keeper.children()
        core = next(p for p in server.children() if "EngineCore" in " ".join(p.cmdline()))
        return {"keeper": keeper, "server": server, "core": core}[part]

    def write(self, name: str, scale: float) -> None:
        (self.policies / f"{name}.yaml").write_text(HEADS.format(name=name, scale=scale))

    def ready(self) -> bool:
        return httpx.get(f"{self.url}/readyz").status_code == 200

    def say(self, **fields: Any) -> openai.types.chat.ChatCompletion:
        asked = {"model": MODEL, "messages": PROMPT, "max_tokens": 24, "temperature": 0, **fields}
        return self.client.chat.completions.create(**asked)


def wait_for(condition: Any, timeout_s: float, what: str) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def gone(processes: list[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def start_serve(folder: Path, *flags: str, stderr: Path) -> subprocess.Popen[str]:
    command = [*MECHCTL, "serve", "--port", "0", "--admin-port", "0", "--policies", str(folder), *flags]
    with stderr.open("w") as file:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, default_model_dir: Path) -> Iterator[Served]:
    """One gateway with its own engine for the whole module."""
    folder = tmp_path_factory.mktemp("policies")
    errors = folder / "stderr.txt"
    for name, scale in (("silent", 0.0), ("loud", 2.0)):
        (folder / f"{name}.yaml").write_text(HEADS.format(name=name, scale=scale))
    process = start_serve(folder, stderr=errors)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready: http://127.0.0.1:"), errors.read_text()
        assert f"curl {line.split()[1]}/chat/completions" in line
        admin = re.search(r"admin and metrics on (\S+)", errors.read_text())
        assert admin is not None
        yield Served(process, line.split()[1].removesuffix("/v1"), admin.group(1), folder)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


def test_official_client_works_unchanged(served: Any) -> None:
    """Chat, completion, stream and model list through the `openai` package."""
    assert {model.id for model in served.client.models.list()} == {
        MODEL,
        f"{MODEL}+silent",
        f"{MODEL}+loud",
    }
    whole = served.say()
    assert whole.usage.completion_tokens == 24
    pieces = served.say(stream=True, stream_options={"include_usage": True})
    text, usage = "", None
    for chunk in pieces:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage.completion_tokens == 24
    completed = served.client.completions.create(model=f"{MODEL}+loud", prompt="The sky is", max_tokens=4)
    assert completed.choices[0].text


def test_policy_changes_the_answer_repeatably(served: Any) -> None:
    """The same prompt gets different answers under `none` and a policy, each repeatable."""
    answers = [
        [served.say(model=model).choices[0].message.content for _ in range(2)]
        for model in (MODEL, f"{MODEL}+none", f"{MODEL}+silent", f"{MODEL}+loud")
    ]
    assert all(first == second for first, second in answers)
    plain, none, silent, loud = (first for first, _ in answers)
    assert plain == none
    assert len({plain, silent, loud}) == 3


def test_receipt_reports_what_the_engine_did(served: Any) -> None:
    """Header and alias select the same revision; the receipt counts tokens and edits."""
    raw = served.client.chat.completions.with_raw_response
    asked = {"messages": PROMPT, "max_tokens": 8, "temperature": 0}
    by_header = raw.create(model=MODEL, extra_headers={"X-Steering-Policy": "loud"}, **asked)
    by_alias = raw.create(model=f"{MODEL}+loud", **asked)
    without = raw.create(model=MODEL, **asked)
    assert by_header.headers["X-Steering-Policy"] == by_alias.headers["X-Steering-Policy"]
    assert re.fullmatch(r"loud@[0-9a-f]{12}", by_header.headers["X-Steering-Policy"])
    receipt = json.loads(by_header.headers["X-Steering-Receipt"])
    assert receipt["requests"] == 1
    assert receipt["tokens_evaluated"] >= 8
    assert receipt["edits_applied"] > 0
    assert without.headers["X-Steering-Policy"] == "none"
    assert json.loads(without.headers["X-Steering-Receipt"])["edits_applied"] == 0


def test_several_choices_are_all_steered(served: Any) -> None:
    """With `n` choices, the receipt covers all of them."""
    raw = served.client.chat.completions.with_raw_response
    answer = raw.create(model=f"{MODEL}+loud", messages=PROMPT, max_tokens=4, n=3)
    assert json.loads(answer.headers["X-Steering-Receipt"])["requests"] == 3
    assert len(answer.parse().choices) == 3


COMPLETIONS = {
    "several prompts": {
        "prompt": ["The sky is", "Once upon a time", "Two"],
        "n": 2,
        "temperature": 1,
        "max_tokens": 5,
    },
    "tokens": {"prompt": [504, 600], "max_tokens": 3},
    "lists of tokens": {"prompt": [[504], [600, 700, 800]], "n": 2, "temperature": 1, "max_tokens": 3},
    "one token": {"prompt": "The sky is", "max_tokens": 1},
    "echo": {"prompt": "The sky is", "max_tokens": 2, "echo": True},
    "echo alone": {"prompt": ["The sky is", "Two"], "max_tokens": 0, "echo": True},
    "stop string": {"prompt": "Count: 1, 2, 3, 4,", "max_tokens": 24, "stop": [",", "\n", "."]},
    "truncated": {"prompt": "word " * 200, "truncate_prompt_tokens": 20, "max_tokens": 2},
}
STREAMS = (
    *({"stream": False}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
)


@pytest.mark.parametrize("name", COMPLETIONS)
def test_every_correct_answer_is_proven(served: Any, name: Any) -> None:
    """Streamed or not, cached or not: no correct answer is withheld."""
    for stream in (*STREAMS, *STREAMS):
        body = {"model": f"{MODEL}+silent", "temperature": 0, **COMPLETIONS[name], **stream}
        answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, (stream, answer.text)
        assert not stream["stream"] or answer.text.endswith("data: [DONE]\n\n"), (stream, answer.text)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ["completions", "responses", "messages"])
def test_every_route_is_steered_and_proven(served: Any, route: Any, stream: Any) -> None:
    """On every route the real engine's receipt proves the policy, and the text differs from the unsteered
    one."""
    fields = {
        "completions": {"prompt": "The sky is", "max_tokens": 24},
        "responses": {"input": PROMPT[0]["content"], "max_output_tokens": 24},
        "messages": {"messages": PROMPT, "max_tokens": 24},
    }[route]
    texts = []
    for policy in ("silent", "none"):
        body = {"model": f"{MODEL}+{policy}", "stream": stream, "temperature": 0, **fields}
        answer = httpx.post(f"{served.url}/v1/{route}", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Steering-Policy"].split("@")[0] == policy
        if stream:
            *_, reported, end = [event for event in answer.text.split("\n\n") if event]
            assert end.startswith(ROUTES[f"/v1/{route}"].end.decode().strip())
            receipt = json.loads(reported.removeprefix(": steering-receipt "))
        else:
            receipt = json.loads(answer.headers["X-Steering-Receipt"])
        assert receipt["requests"] == 1
        assert receipt["tokens_evaluated"] >= 8
        assert (receipt["edits_applied"] > 0) == (policy == "silent")
        # Only the generated text: ids and times always differ.
        texts.append(re.findall(r'"(?:text|delta)":\s*"((?:[^"\\]|\\.)*)"', answer.text))
    assert texts[0]
    assert texts[0] != texts[1]


def test_tokens_are_counted_without_a_policy(served: Any) -> None:
    """Tokenizing, detokenizing and counting are passed to the engine and run no model."""

    def post(path: str, **body: Any) -> Any:
        answer = httpx.post(f"{served.url}{path}", json={"model": MODEL, **body}, timeout=60)
        assert answer.status_code == 200, answer.text
        return answer.json()

    tokens = post("/tokenize", prompt="The sky is blue.")["tokens"]
    assert post("/detokenize", tokens=tokens)["prompt"] == "The sky is blue."
    assert post("/v1/messages/count_tokens", messages=PROMPT)["input_tokens"] > 10


def test_anthropics_client_works_unchanged(served: Any) -> None:
    """The `anthropic` package gets a message, a stream and errors of the types it knows."""
    import anthropic

    client = anthropic.Anthropic(base_url=served.url, api_key="unused", max_retries=0)
    asked = {"model": f"{MODEL}+silent", "messages": PROMPT, "max_tokens": 8}
    assert client.messages.create(**asked).content[0].text
    with client.messages.stream(**asked) as stream:
        assert stream.get_final_text()
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(**{**asked, "model": "claude"})


def test_clients_cannot_reach_the_engines_own_switches(served: Any) -> None:
    """A client's `extra_body` never decides the revision; its mistakes get an error."""
    with pytest.raises(openai.BadRequestError, match="vllm_xargs") as refused:
        served.say(extra_body={"vllm_xargs": {"interpretops_revision": "none"}})
    assert refused.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.BadRequestError, match=r"max_tokens|maximum context"):
        served.say(max_tokens=100_000)
    with pytest.raises(openai.NotFoundError):
        served.say(model="gpt-4o")


async def stream(
    served: Served, session: aiohttp.ClientSession, model: str, tokens: int, began: asyncio.Event
) -> Any:
    """One raw stream: its policy header and its text."""
    body = {"model": model, "messages": PROMPT, "stream": True, "max_tokens": tokens, "ignore_eos": True}
    async with session.post(f"{served.url}/v1/chat/completions", json=body) as answer:
        text = b""
        async for chunk in answer.content.iter_any():
            text += chunk
            began.set()
        return answer.headers["X-Steering-Policy"], text.decode()


async def test_edit_under_load_interrupts_no_stream(served: Any) -> None:
    """Eight streams continue under their revision while new requests get the edited one, then a broken
    one."""
    path = served.policies / "loud.yaml"
    async with (
        aiohttp.ClientSession() as session,
        openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as client,
    ):

        async def label() -> str:
            raw = await client.chat.completions.with_raw_response.create(
                model=f"{MODEL}+loud", messages=PROMPT, max_tokens=1
            )
            return str(raw.headers["X-Steering-Policy"])

        old = await label()
        events = [asyncio.Event() for _ in range(8)]
        streams = [
            asyncio.create_task(stream(served, session, f"{MODEL}+loud", 300, event)) for event in events
        ]
        await asyncio.gather(*(event.wait() for event in events))
        served.write("loud", 1.5)
        async with asyncio.timeout(20):
            while (new := await label()) == old:
                pass
        assert not any(task.done() for task in streams)
        path.write_text("meta: {id: loud}\ninterventions: [")
        async with asyncio.timeout(20):
            while True:
                async with session.get(f"{served.admin}/admin/policies") as answer:
                    (entry,) = [e for e in (await answer.json())["policies"] if e["id"] == "loud"]
                if entry["error"]:
                    break
        assert await label() == new
        async with session.get(f"{served.admin}/metrics") as answer:
            assert 'interpretops_policy_broken{policy="loud"} 1.0' in await answer.text()
        for given, text in await asyncio.gather(*streams):
            assert given == old
            assert text.endswith("\n\ndata: [DONE]\n\n")
            (receipt,) = re.findall(r"^: steering-receipt (.*)$", text, re.MULTILINE)
            assert json.loads(receipt)["revision"].startswith(old.removeprefix("loud@"))
            assert json.loads(receipt)["tokens_evaluated"] >= 300
    served.write("loud", 2.0)


@pytest.mark.parametrize(
    "victim", ["core", *(pytest.param(part, marks=pytest.mark.long) for part in ("keeper", "server"))]
)
async def test_engine_killed_in_mid_stream(served: Any, victim: Any) -> None:
    """The stream ends in an error without end marker; nobody is served until the engine is proven again."""
    await asyncio.to_thread(wait_for, served.ready, 120, "ready")
    async with aiohttp.ClientSession() as session:
        began = asyncio.Event()
        running = asyncio.create_task(stream(served, session, f"{MODEL}+silent", 1000, began))
        await began.wait()
        before = served.engine_processes()
        served.engine_process(victim).kill()
        label, text = await running
        *_, last = [event for event in text.split("\n\n") if event]
        assert json.loads(last.removeprefix("data: "))["error"]["message"]
        assert "data: [DONE]" not in text

        async def ask(model: str) -> tuple[int, str | None]:
            body = {"model": model, "messages": PROMPT, "max_tokens": 4}
            async with session.post(f"{served.url}/v1/chat/completions", json=body) as answer:
                await answer.read()
                return answer.status, answer.headers.get("X-Steering-Policy")

        seen = set()
        async with asyncio.timeout(180):
            while True:
                steered, plain = await ask(f"{MODEL}+silent"), await ask(MODEL)
                seen |= {steered, plain}
                if steered[0] == plain[0] == 200:
                    break
                await asyncio.sleep(0.1)
        assert (503, None) in seen
        assert seen <= {(503, None), (502, None), (200, label), (200, "none")}
        assert served.ready()
        await asyncio.to_thread(wait_for, lambda: gone(before), 20, "the old engine's processes are gone")


def test_interrupt_leaves_nothing_behind(served: Any) -> None:
    """Ctrl-C ends the gateway and all engine processes, with status 0."""
    wait_for(served.ready, 180, "ready")
    processes = [psutil.Process(served.process.pid), *served.engine_processes()]
    assert len(processes) >= 3
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(60) == 0
    wait_for(lambda: gone(processes), 10, "all processes gone")


def test_killed_gateway_leaves_nothing_behind(tmp_path: Path, default_model_dir: Path) -> None:
    """A gateway that is killed, here while its engine starts, leaves no process behind."""
    process = start_serve(tmp_path, stderr=tmp_path / "stderr.txt")
    mine = psutil.Process(process.pid)

    def engine_started() -> bool:
        return len(mine.children(recursive=True)) >= 2

    wait_for(engine_started, 60, "engine started")
    processes = mine.children(recursive=True)
    process.kill()
    process.wait()
    wait_for(lambda: gone(processes), 30, "all processes gone")


def fail(tmp_path: Path, *flags: str, config: str = "{}", timeout_s: float = 60) -> str:
    """The error of a failed start: one line, status 2, no traceback."""
    file = tmp_path / "config.yaml"
    file.write_text(config)
    command = [*MECHCTL, "serve", "--config", str(file), "--policies", str(tmp_path), *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    return ended.stderr.strip().splitlines()[-1]


def test_port_in_use_is_one_line(tmp_path: Path) -> None:
    """A port in use is reported, with the flag that changes it, before anything slow."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert fail(tmp_path, "--port", str(port)) == (
            f"gateway.port = {port}, but another program uses it; stop that program, or "
            "choose another port with --port"
        )


def test_missing_model_is_one_line(tmp_path: Path) -> None:
    """A model that cannot be found is named."""
    reported = fail(tmp_path, "--model", "no-such-model", "--port", "0", "--admin-port", "0")
    assert reported.startswith("model.name = 'no-such-model', but that is neither a folder")


def test_too_little_memory_is_one_line(tmp_path: Path, default_model_dir: Path) -> None:
    """An engine that would not fit in memory is refused before it starts."""
    config = "engine: {kv_cache_gib: 900000}"
    reported = fail(tmp_path, "--port", "0", "--admin-port", "0", config=config)
    assert re.match(r"engine.kv_cache_gib = 900000: .* needs about 9\d+\.\d GiB, but", reported)


def test_engine_that_dies_while_starting_is_one_line(tmp_path: Path, default_model_dir: Path) -> None:
    """The error gives the engine's own reason, and no process is left."""
    config = "engine: {extra_args: ['--max-num-batched-tokens=1']}"
    reported = fail(tmp_path, "--port", "0", "--admin-port", "0", config=config, timeout_s=180)
    assert reported.startswith("engine exited with status 1: max_num_batched_tokens (1) must be")
    assert "; see " in reported
