"""An engine must be proven before it serves anyone, and again after it was lost."""

import asyncio
import json

import pytest
from fake_engine import FakeEngine
from running_gateway import Start, Until

from interpretops.errors import EngineError
from proxy.engines import loop as engine_loop


@pytest.mark.parametrize(
    ("trick", "why"), [("no_plugin", "VLLM_PLUGINS=interpretops"), ("selftest_fails", "nothing changed")]
)
async def test_unproven_engine_serves_nobody(start: Start, engine: FakeEngine, trick: str, why: str) -> None:
    """Without the plugin or a passed self-test, start-up fails and even unsteered requests are refused."""
    engine.trick = trick
    front = await start("calm", wait=False)
    task = front.apps.engine_loop.task
    await asyncio.wait({task}, timeout=10)
    with pytest.raises(EngineError, match=why):
        task.result()
    for model in ("tiny-model", "tiny-model+calm", "tiny-model+none"):
        status, headers, body = await front.chat(model=model)
        assert (status, body["error"]["code"]) == (503, "engine_not_ready")
        assert headers["x-should-retry"] == "true"
    assert not await front.engine_ready()
    assert engine.seen == []


async def test_plans_are_loaded_again_into_a_restarted_engine(
    start: Start, engine: FakeEngine, until: Until
) -> None:
    """After an engine restart the gateway is not ready until the engine is proven and holds every plan
    again."""
    front = await start("calm")
    assert await front.engine_ready()
    engine.boot_id, engine.trick = "second", "unhealthy"
    engine.plans.clear()

    async def lost() -> bool:
        return not await front.engine_ready()

    await until(lost)
    assert (await front.chat())[0] == 503
    engine.trick = ""
    await until(front.engine_ready)
    status, headers, _ = await front.chat(model="tiny-model+calm")
    assert (status, headers["X-Steering-Policy"][:5]) == (200, "calm@")
    assert len(engine.plans) == 1


async def test_engine_replaced_unnoticed_is_proven_again(
    start: Start, engine: FakeEngine, until: Until
) -> None:
    """An engine replaced between health checks gets its plans again before any request."""
    front = await start("calm")
    engine.boot_id = "second"
    engine.plans.clear()

    async def loaded() -> bool:
        return len(engine.plans) == 1

    await until(loaded)
    await until(front.engine_ready)
    assert [line["boot_id"] for line in front.log if line["event"] == "engine_ready"][1:] == ["second"]


async def test_stream_in_progress_ends_when_its_engine_is_lost(start: Start, engine: FakeEngine) -> None:
    """A stream whose engine is lost ends in an error at once, even if the engine keeps the connection
    open."""
    front = await start("calm")
    engine.trick = "hold_stream"
    body = {"model": "tiny-model+calm", "messages": [], "stream": True}
    async with front.public.post("/v1/chat/completions", json=body) as answer:
        await answer.content.readany()
        engine.boot_id = "second"
        text = (await asyncio.wait_for(answer.content.read(), 15)).decode()
    *_, last = [event for event in text.split("\n\n") if event]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_failed"


async def test_request_in_progress_ends_when_its_engine_is_lost(start: Start, engine: FakeEngine) -> None:
    """An unstreamed request fails at once too."""
    front = await start("calm")
    engine.trick = "hold"
    request = asyncio.create_task(front.chat(model="tiny-model+calm"))
    await engine.arrived.wait()
    engine.boot_id = "second"
    status, _, body = await asyncio.wait_for(request, 15)
    assert (status, body["error"]["code"]) == (502, "engine_failed")


async def test_engine_in_a_long_step_is_kept(
    start: Start, engine: FakeEngine, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers that are silent for less than `engine.silence_timeout_s` are busy: the engine is not lost."""
    monkeypatch.setattr(engine_loop, "_ATTEST_S", 0.1)
    front = await start("calm")
    engine.trick = "workers_hang"

    async def asked_often() -> bool:
        return engine.silences >= 5

    await until(asked_often, 20)
    assert await front.engine_ready()
    assert not [line for line in front.log if line["event"] == "engine_lost"]


async def test_single_failed_health_checks_do_not_add_up(
    start: Start, engine: FakeEngine, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Occasional failed health checks with successful ones in between do not lose the engine."""
    monkeypatch.setattr(engine_loop, "_ATTEST_S", 0.1)
    monkeypatch.setattr(engine_loop, "_WATCH_EVERY_S", 0.1)
    front = await start("calm")
    engine.trick = "workers_hang"
    for _ in range(4):
        before, engine.sick = engine.silences, 1

        async def asked_again(before: int = before) -> bool:
            return engine.sick == 0 and engine.silences > before

        await until(asked_again, 10)
    assert await front.engine_ready()
    assert not [line for line in front.log if line["event"] == "engine_lost"]


async def test_engine_with_hanging_workers_is_lost(
    start: Start, engine: FakeEngine, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that reports itself healthy while its workers hang is lost after the silence timeout."""
    monkeypatch.setattr(engine_loop, "_ATTEST_S", 0.1)
    front = await start("calm", **{"engine.silence_timeout_s": 3})
    engine.trick = "workers_hang"

    async def lost() -> bool:
        return not await front.engine_ready()

    await until(lost, 20)
    got = [line["reason"] for line in front.log if line["event"] == "engine_lost"]
    assert len(got) == 1
    assert got[0].startswith("the engine's workers were silent for engine.silence_timeout_s = 3; raise it")


async def test_health_is_not_readiness(start: Start, engine: FakeEngine) -> None:
    """The gateway's liveness does not depend on the engine."""
    engine.trick = "unhealthy"
    front = await start("calm", wait=False)
    async with front.public.get("/healthz") as answer:
        assert answer.status == 200
    assert not await front.engine_ready()
    async with front.admin.get("/metrics") as answer:
        text = await answer.text()
    assert "interpretops_ready 0.0" in text
    assert (await front.policy_list())["not_ready"] == "the engine is starting"
