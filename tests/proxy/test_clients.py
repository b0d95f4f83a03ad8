"""Popular clients work unchanged: answers, streams, tools, and errors of the types they know."""

import asyncio
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from engines import EngineServer
from fake_engine import FakeEngine
from faults.marker import steered_only
from faults.stand import make_stand
from running_gateway import Start, Until

CLIENTS = Path(__file__).parents[1] / "clients"
PYTHON = CLIENTS / ".venv/bin/python"
PYTHON_CLIENTS = ("openai", "litellm", "langchain-openai", "llm")
NPM_CLIENTS = ("openai-npm", "ai-sdk")
CALL = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}


@pytest.fixture(params=(*PYTHON_CLIENTS, *NPM_CLIENTS))
def tour(request: pytest.FixtureRequest) -> Any:
    """The command of one client's test program; skipped where the programs are not installed."""
    client = request.param
    if client in NPM_CLIENTS:
        stamp, command = CLIENTS / "node_modules/stamp", [shutil.which("node"), "programs.mjs"]
    else:
        stamp, command = CLIENTS / ".venv/stamp", [PYTHON, "programs.py"]
    if not stamp.exists() and "CI" not in os.environ:
        pytest.skip(f"{client}: tests/clients/install.sh has not run, or failed")
    return [*command, client]


async def take(tour: Any, *arguments: Any) -> Any:
    return await asyncio.create_subprocess_exec(
        *tour,
        *arguments,
        cwd=CLIENTS,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )


async def line_of(process: Any) -> Any:
    return json.loads(await asyncio.wait_for(process.stdout.readline(), 240))


def script(body: Any) -> Any:
    """vLLM's answer to a chat, streamed or not, with a tool call if there are tools."""
    head = {"id": "chatcmpl-1", "created": 1, "model": body["model"]}
    usage = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    if body.get("stream"):
        deltas = [{"role": "assistant", "content": ""}, {"content": "Ice "}, {"content": "cream."}, {}]
        ends = [None, None, None, "stop"]
        kind = {**head, "object": "chat.completion.chunk"}
        return [
            {**kind, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]}
            for delta, end in zip(deltas, ends, strict=True)
        ]
    message = {"role": "assistant", "content": "Ice cream."}
    if body.get("tools"):
        message = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if body.get("tools") else "stop"}
    return [{**head, "object": "chat.completion", "choices": [choice], "usage": usage}]


async def test_client_gets_answers_and_the_errors_it_knows(
    start: Start, engine: FakeEngine, until: Until, tour: Any
) -> None:
    """Answers, streams and tools work; a mandatory policy gives 403, an unknown model 404, no engine 503."""
    engine.script = script
    front = await start("calm", bindings=[{"policy": "calm", "mode": "mandatory"}])
    process = await take(tour, f"{front.public._base_url}v1", "tiny-model", "tools", "away")
    assert await line_of(process) == {
        "whole": "Ice cream.",
        "streamed": "Ice cream.",
        "tool": ["weather", {"city": "Paris"}],
        "mandatory": 403,
        "unknown": 404,
    }
    engine.trick = "unhealthy"
    engine.boot_id = "second"

    async def lost() -> Any:
        return not await front.engine_ready()

    await until(lost)
    process.stdin.write(b"\n")
    assert await line_of(process) == {"away": 503}
    assert await process.wait() == 0
    revisions = {seen["vllm_xargs"]["interpretops_revision"] for seen in engine.seen}
    assert revisions == {front.apps.gateway.catalogue.entries["calm"].active.revision}


@pytest.fixture
async def stand(engine_server: EngineServer, default_model_dir: Path, tmp_path: Path) -> AsyncIterator[Any]:
    """A real gateway and engine under a policy that allows only one word."""
    engine = {"engine_socket": str(engine_server.socket), "engine_pid": engine_server.process.pid}
    async with make_stand(tmp_path, default_model_dir, **engine) as running:
        yield running


@pytest.mark.engine
async def test_client_is_steered_by_a_real_engine(stand: Any, tour: Any) -> None:
    """The client's user reads the policy's words, streamed or not."""
    process = await take(tour, f"{stand.url}/v1", stand.model)
    seen = await line_of(process)
    assert (seen["mandatory"], seen["unknown"]) == (403, 404)
    for text in (seen["whole"], seen["streamed"]):
        assert text
        assert steered_only(text)
    assert await process.wait() == 0


def test_lock_of_npm_programs_names_no_registry() -> None:
    """The lock file works with any registry that npm is configured for."""
    lock = json.loads((CLIENTS / "package-lock.json").read_text())
    assert [name for name, package in lock["packages"].items() if "resolved" in package] == []
