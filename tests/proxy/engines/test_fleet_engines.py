"""Two real engines behind two gateways: one dies under load and returns, and no answer is unsteered."""

import asyncio
import json
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from engines import EngineServer
from running_gateway import Front, PolicyWriter, Start, Until
from tiny_families import save_family

pytestmark = pytest.mark.engine
WORKERS = 4
"""Concurrent requests per gateway."""
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""By default vLLM binds every engine's worker to the same core, where a busy one starves a starting one."""


@pytest.fixture(scope="module")
def model(default_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model with random weights and the default model's tokenizer."""
    folder = save_family(
        "LlamaForCausalLM", tmp_path_factory.mktemp("model"), vocab_size=49152, max_position_embeddings=256
    )
    for file in default_model_dir.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def servers(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two engines, started together."""
    folders = [tmp_path_factory.mktemp(name) for name in ("a", "b")]
    running = [EngineServer(model, folder, "tiny-model", UNBOUND) for folder in folders]
    with ExitStack() as ending:
        for server in running:
            server.start("--dtype", "float32")
            ending.callback(server.stop)
        for server in running:
            server.wait()
        yield running


class Load:
    """Sends requests continuously, and records label and text of each answer."""

    def __init__(self, fronts: Any) -> None:
        self.answers = Counter()
        self.lost = []
        self._stop = False
        self._tasks = [asyncio.create_task(self._ask(front)) for front in fronts for _ in range(WORKERS)]

    async def _ask(self, front: Front) -> None:
        turn = 0
        while not self._stop:
            turn += 1
            stream = turn % 2 == 0
            status, headers, body = await ask(front, stream=stream)
            text = text_of(body, stream) if status == 200 else None
            if text is None:
                self.lost.append((status, body if isinstance(body, str) else body["error"]["code"]))
            else:
                self.answers[headers["X-Steering-Policy"], text] += 1

    async def end(self) -> None:
        self._stop = True
        await asyncio.gather(*self._tasks)


async def ask(front: Front, model: Any = "tiny-model+calm", **fields: Any) -> Any:
    return await front.chat(model=model, max_tokens=12, temperature=0, ignore_eos=True, **fields)


def text_of(body: Any, stream: Any) -> Any:
    """The text of an answer; None for a stream that did not end properly."""
    if not stream:
        return body["choices"][0]["message"]["content"]
    if "data: [DONE]" not in body or ": steering-receipt" not in body:
        return None
    events = [json.loads(line[6:]) for line in body.split("\n") if line.startswith("data: {")]
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


async def ready(front: Front) -> Any:
    async with front.admin.get("/admin/engines") as answer:
        return sum(shown["ready"] for shown in (await answer.json())["engines"])


async def test_nothing_goes_unsteered_while_an_engine_dies_and_returns(
    start: Start, servers: Any, until: Until, policy_writer: PolicyWriter
) -> None:
    """Only requests at the dead engine fail; it takes requests again once it attests the policy."""
    urls = [server.url for server in servers]
    wish = {"engine.url": urls, "gateway.shutdown_grace_s": 5}
    fronts = [await start("calm", wait=False, **wish), await start(wait=False, **wish)]

    async def all_ready(number: Any = 2) -> Any:
        return [await ready(front) for front in fronts] == [number] * 2

    await until(all_ready, 120)
    _, headers, body = await ask(fronts[0])
    old = headers["X-Steering-Policy"], text_of(body, False)
    _, _, body = await ask(fronts[0], model="tiny-model+none")
    unsteered = text_of(body, False)
    assert old[0].startswith("calm@")
    assert old[1] != unsteered

    load = Load(fronts)

    async def answered(more: Any) -> Any:
        wanted = load.answers.total() + more

        async def enough() -> Any:
            return load.answers.total() >= wanted

        await until(enough, 120)

    await answered(20)
    os.killpg(servers[0].process.pid, signal.SIGKILL)
    servers[0].process.wait()
    await until(lambda: all_ready(1), 60)
    lost = len(load.lost)
    assert lost <= len(fronts) * WORKERS
    await answered(20)
    assert set(load.answers) == {old}
    assert len(load.lost) == lost

    servers[0].start()
    await asyncio.to_thread(servers[0].wait)
    await until(all_ready, 120)
    assert len(load.lost) == lost
    proven = [line for line in fronts[0].log if line["event"] == "engine_ready"]
    assert len(proven) == 3
    before = servers[0].answered()
    await answered(20)
    assert servers[0].answered() > before

    policy_writer(fronts[0].policies, "calm", 0.0)

    async def both_changed() -> Any:
        found = [(await ask(front))[1]["X-Steering-Policy"] for front in fronts]
        return old[0] not in found

    await until(both_changed, 60)
    _, headers, body = await ask(fronts[0])
    new = headers["X-Steering-Policy"], text_of(body, False)
    await answered(20)
    await load.end()
    assert set(load.answers) == {old, new}
    assert len(load.lost) == lost, load.lost
    assert len({old[1], new[1], unsteered}) == 3
