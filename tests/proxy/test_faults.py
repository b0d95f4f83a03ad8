"""The short fault run: everything that can be broken around an engine shared with other tests."""

import asyncio
import json
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from engines import EngineServer
from fake_engine import FakeEngine
from faults.answers import Judgement, judge
from faults.breakages import breakages
from faults.gateway_program import state
from faults.hostile import disconnect, is_whole, send_malformed
from faults.leaks import MEMORY_MB, Figures
from faults.marker import POLICY, WORD
from faults.raw_requests import malformed
from faults.run import Outcome, check_audit, run_faults
from faults.stand import FAKETIME, make_stand
from faults.traffic import Traffic
from running_gateway import Start, Until

from proxy.serve import POOL_THREADS, new_loop

LABEL = f"{POLICY}@{'a' * 12}"
RECEIPT = json.dumps({"policy": POLICY, "revision": "a" * 64, "edits_applied": 1})
CHAT = json.dumps({"choices": [{"message": {"content": WORD * 3}}]})
ERROR = json.dumps({"error": {"message": "m", "type": "t", "param": None, "code": "c"}})
WHOLE = {"Content-Type": "application/json", "X-Steering-Policy": LABEL, "X-Steering-Receipt": RECEIPT}
STREAM = {"Content-Type": "text/event-stream", "X-Steering-Policy": LABEL}


def stream(*events: str, word: str = WORD) -> str:
    delta = json.dumps({"choices": [{"delta": {"content": word}}]})
    return "".join(f"{event}\n\n" for event in (f"data: {delta}", *events))


@pytest.mark.parametrize(
    ("kind", "status", "headers", "text"),
    [
        ("steered", 200, WHOLE, CHAT),
        ("unsteered", 200, {**WHOLE, "X-Steering-Policy": "none"}, CHAT),
        ("unsteered", 200, {**WHOLE, "X-Steering-Receipt": "null"}, CHAT),
        ("unsteered", 200, {**WHOLE, "X-Steering-Receipt": RECEIPT.replace("aa", "bb")}, CHAT),
        ("unsteered", 200, WHOLE, CHAT.replace(WORD * 3, "Paris")),
        ("unsteered", 200, WHOLE, CHAT.replace(WORD * 3, "")),
        ("steered", 200, STREAM, stream(f": steering-receipt {RECEIPT}", "data: [DONE]")),
        ("unsteered", 200, STREAM, stream("data: [DONE]")),
        ("unsteered", 200, STREAM, stream(f"data: {ERROR}", word="Paris")),
        ("broken_off", 200, STREAM, stream(f"data: {ERROR}")),
        ("misshapen", 200, STREAM, stream()),
        ("refused", 503, {"X-Request-Id": "r"}, ERROR),
        ("misshapen", 500, {"X-Request-Id": "r"}, ERROR),
        ("misshapen", 503, {}, ERROR),
        ("misshapen", 400, {"X-Request-Id": "r"}, "Bad Request"),
    ],
)
def test_answers_are_judged_by_receipt_and_by_words(
    kind: str, status: int, headers: dict[str, str], text: str
) -> None:
    """Only a proven answer with nothing but the policy's word counts as steered."""
    assert judge(status, headers, text).kind == kind


def test_engine_failure_is_reported_with_its_cause() -> None:
    """The error response or a stream's last event gives the cause; other refusals are the guard's own."""
    error = {**json.loads(ERROR)["error"], "code": "engine_failed", "message": "too slow"}
    failed = json.dumps({"error": error})
    assert judge(502, {"X-Request-Id": "r"}, failed).reported == "engine_failed: too slow"
    assert judge(200, STREAM, stream(f"data: {failed}")).reported == "engine_failed: too slow"
    assert judge(503, {"X-Request-Id": "r"}, ERROR).reported == ""
    traffic = Traffic(SimpleNamespace())
    traffic.count(Judgement("refused", reported="engine_failed: too slow"), "/v1/x stream=False", "{}")
    assert traffic.failures == {"/v1/x stream=False: engine_failed: too slow": 1}
    assert traffic.faults == []


FIGURES = Figures(3, 20, 6, 4, 1, 0, 1, 0, 80.0, Counter(["a", "b", "b"]))


@pytest.mark.parametrize(
    ("changed", "leaks"),
    [
        ({}, {}),
        ({"pool_idle": POOL_THREADS, "fds": 19, "memory_mb": 80.0 + MEMORY_MB}, {}),
        ({"threads": 5}, {"threads": 1}),
        ({"fds": 22, "memory_mb": 81.0 + MEMORY_MB}, {"fds": 2, "memory_mb": 1 + MEMORY_MB}),
        ({"tasks": 4, "task_names": Counter(["a", "b", "b", "c"])}, {"tasks": {"c": 1}}),
    ],
)
def test_growth_is_reported_as_a_leak(changed: dict[str, Any], leaks: dict[str, Any]) -> None:
    """Any growth after a fault is a leak, except a pool that fills up and memory within its tolerance."""
    outcome = Outcome(counts=Counter(), before=FIGURES, after=replace(FIGURES, **changed))
    assert outcome.leaks == leaks
    assert outcome.summary()["leaks"] == len(leaks)


def test_pool_threads_count_only_while_busy() -> None:
    """Threads of the gateway's pool count only while they do not return from their work."""
    release, all_there = threading.Event(), threading.Barrier(POOL_THREADS)

    def counted(pool_idle: int) -> int | None:
        reported = state()
        return reported["threads"] - reported["pool_idle"] if reported["pool_idle"] == pool_idle else None

    async def once(pool_idle: int) -> int:
        async with asyncio.timeout(10):
            while (found := counted(pool_idle)) is None:  # noqa: ASYNC110 - other threads' state
                await asyncio.sleep(0.01)
        return found

    async def run() -> list[int]:
        before = await once(0)
        await asyncio.gather(*(asyncio.to_thread(all_there.wait) for _ in range(POOL_THREADS)))
        filled = await once(POOL_THREADS)
        stuck = asyncio.create_task(asyncio.to_thread(release.wait))
        with_stuck = await once(POOL_THREADS - 1)
        beside = threading.Thread(target=release.wait)
        beside.start()
        with_both = await once(POOL_THREADS - 1)
        release.set()
        await stuck
        beside.join()
        return [found - before for found in (filled, with_stuck, with_both)]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(run()) == [0, 1, 2]


@pytest.fixture
async def scripted_stand(start: Start, engine: FakeEngine) -> AsyncIterator[Any]:
    """A gateway with the scripted engine, fault-free, and short stall timeouts."""
    front = await start("calm", **{"gateway.body_timeout_s": 1})
    runner = front.runners[0]
    watch = asyncio.create_task(front.apps.gateway.stall_guard.run(lambda: runner.server.connections))
    yield SimpleNamespace(url=str(front.public._base_url).rstrip("/"), model="tiny-model")
    watch.cancel()


async def test_only_requests_without_an_end_of_headers_get_no_answer(scripted_stand: Any) -> None:
    """Every malformed request gets a response, except one that was closed before it was complete."""
    traffic = Traffic(scripted_stand)
    await send_malformed(scripted_stand, traffic, 300)
    assert [line for line in traffic.faults if "no answer" in line or "misshapen" in line] == []
    # Some are refused for the part received so far.
    without_end = [data for data in malformed(300, scripted_stand.model) if not is_whole(data)]
    assert 0 < traffic.counts["unfinished"] <= len(without_end) < 15
    assert traffic.counts["refused"] > 250


async def test_client_disconnect_always_stops_the_engine(
    scripted_stand: Any, engine: FakeEngine, until: Until
) -> None:
    """Before headers, before a token, midway, or unstreamed: nothing keeps running for a disconnected
    client."""
    ended = []

    async def answer(request: web.Request, body: dict[str, Any], revision: str) -> None:
        try:
            if body["stream"]:
                response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
                await response.prepare(request)
                await response.write(b'data: {"choices": []}\n\n' * 3)
            await engine.go_on.wait()
        finally:
            ended.append(body["stream"])

    engine._answer = answer
    traffic = Traffic(scripted_stand)
    await disconnect(scripted_stand, traffic, 40)

    async def all_stopped() -> bool:
        return len(ended) == len(engine.seen)

    await until(all_stopped)
    assert traffic.counts == {"left": 40}
    assert ended.count(True) >= 20
    assert ended.count(False) == 10


@pytest.mark.engine
@pytest.mark.timeout(1200)
async def test_faults_end_in_no_unsteered_answer_and_no_leak(
    engine_server: EngineServer, default_model_dir: Path, tmp_path: Path
) -> None:
    """Whatever breaks: answers are steered or refused, nothing leaks, and the audit log is intact."""
    faults = [fault for fault in breakages(malformed=90, disconnects=24) if not fault.needs_own_engine]
    assert FAKETIME.exists() or not os.environ.get("CI")
    async with make_stand(
        Path(tmp_path),
        default_model_dir,
        engine_socket=str(engine_server.socket),
        engine_pid=engine_server.process.pid,
    ) as stand:
        outcome = await run_faults(stand, faults, print)
    outcome.wrong += check_audit(stand)
    assert outcome.wrong == []
    assert outcome.leaks == {}
    assert outcome.after.pool_idle > 0
    assert outcome.counts["unsteered"] == 0
    assert outcome.counts["steered"] > 20
    assert outcome.counts["refused"] > 20
