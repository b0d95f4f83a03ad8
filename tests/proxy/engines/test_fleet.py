"""Several engines: each is proven first, and gets only requests whose revision it attests."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, PolicyWriter, Start, Until

from interpretops.engine_api import SpecialTokenList
from proxy.engines import fleet_loop
from proxy.engines.circuit_breaker import Breaker

STEERED = "tiny-model+calm"


@pytest.fixture
async def other(engine: FakeEngine, tmp_path: Path) -> AsyncIterator[Any]:
    """A second engine, not running yet."""
    async with AsyncExitStack() as stack:
        other = type(engine)(tmp_path / "o.sock")
        other.up = lambda: stack.enter_async_context(other.running())
        yield other


@pytest.fixture
async def pair(start: Start, engine: FakeEngine, other: Any, until: Until) -> Callable[..., Awaitable[Front]]:
    """A gateway with two ready engines."""
    await other.up()

    async def run(**sections: Any) -> Front:
        front = await start("calm", **{"engine.url": [engine.url, other.url], **sections})
        await until(ready(front, 2))
        return front

    return run


def ready(front: Front, number: int) -> Callable[..., Any]:
    async def enough() -> bool:
        return sum(shown["ready"] for shown in await engines(front)) == number

    return enough


async def engines(front: Front) -> list[dict[str, Any]]:
    async with front.admin.get("/admin/engines") as answer:
        return (await answer.json())["engines"]


async def reload(front: Front) -> dict[str, Any]:
    async with front.admin.post("/admin/reload") as answer:
        return await answer.json()


async def served(front: Front) -> str:
    status, headers, _ = await front.chat(model=STEERED)
    return headers["X-Steering-Policy"].removeprefix("calm@") if status == 200 else status


def metric(front: Front, text: str) -> bool:
    return text in front.apps.gateway.metrics.render().decode()


async def test_least_busy_engine_is_asked(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any, until: Until
) -> None:
    """Requests go to the engine with fewer in progress, and alternate when equal."""
    front = await pair()
    for _ in range(4):
        assert await served(front) != 503
    assert (len(engine.seen), len(other.seen)) == (2, 2)
    engine.trick = other.trick = "hold"
    held = [asyncio.create_task(front.chat(model=STEERED)) for _ in range(6)]

    async def all_there() -> bool:
        return len(engine.seen) + len(other.seen) == 10

    await until(all_there)
    assert (len(engine.seen), len(other.seen)) == (5, 5)
    assert [shown["outstanding"] for shown in await engines(front)] == [3, 3]
    assert metric(front, f'interpretops_engine_outstanding{{engine="{engine.socket}"}} 3.0')
    engine.go_on.set()
    other.go_on.set()
    assert {status for status, *_ in await asyncio.gather(*held)} == {200}
    assert [shown["outstanding"] for shown in await engines(front)] == [0, 0]


async def test_revision_that_one_engine_cannot_hold_serves_nowhere(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any, policy_writer: PolicyWriter
) -> None:
    """A full table at one engine cancels the change: the old revision keeps serving on both."""
    front = await pair(**{"gateway.watch_policies": False})
    first = await served(front)
    other.trick = "table_full"
    policy_writer(front.policies, "calm", 0.25)
    assert "full" in next(iter((await reload(front))["failed"].values()))
    assert {await served(front) for _ in range(4)} == {first}
    assert [len(one.plans) for one in (engine, other)] == [1, 1]
    other.trick = ""
    assert (await reload(front))["ok"]
    assert first not in {await served(front) for _ in range(4)}


async def test_engine_that_attests_another_digest_gets_no_requests_of_it(
    pair: Callable[..., Awaitable[Front]],
    engine: FakeEngine,
    other: Any,
    policy_writer: PolicyWriter,
    until: Until,
) -> None:
    """The change applies where it is attested; the other engine is skipped until it attests it too."""
    front = await pair(**{"gateway.watch_policies": False})
    first = await served(front)
    other.trick = "wrong_digest"
    policy_writer(front.policies, "calm", 0.25)
    assert (await reload(front))["ok"]
    engine.seen.clear()
    other.seen.clear()
    assert first not in {await served(front) for _ in range(4)}
    assert (len(engine.seen), len(other.seen)) == (4, 0)
    assert metric(front, f'interpretops_engine_unattested_total{{engine="{other.socket}"}} 1.0')
    other.trick = ""
    await reload(front)
    assert first not in {await served(front) for _ in range(4)}
    assert other.seen


async def test_engine_that_lost_a_plan_gets_its_requests_only_after_reloading(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any, until: Until
) -> None:
    """A plan that an engine no longer attests is loaded again, with or without a file watch."""
    front = await pair(**{"gateway.watch_policies": False})
    other.plans.clear()

    async def mended() -> bool:
        return len(other.plans) == 1

    await until(mended)
    assert any(line["event"] == "revisions_lost" for line in front.log)


async def test_request_goes_to_another_engine_when_the_first_cannot_be_reached(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any
) -> None:
    """Nothing has started there, so nothing runs twice; the client sees no error."""
    front = await pair()
    await other.runner.cleanup()
    assert 503 not in {await served(front) for _ in range(4)}
    assert len(engine.seen) == 4
    assert metric(front, "interpretops_engine_retries_total{")


async def test_request_goes_to_another_engine_when_the_first_refuses_it(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any
) -> None:
    """503 before any work: another engine is tried. With none left, the caller gets an error."""
    front = await pair()
    other.trick = "busy"
    assert 503 not in {await served(front) for _ in range(4)}
    assert len(engine.seen) == 4
    engine.trick = "busy"
    assert (await front.chat(model=STEERED))[0] in (502, 503)


async def test_started_answer_is_not_retried_elsewhere(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any
) -> None:
    """If an engine dies during a stream, the stream ends in an error and no other engine is asked."""
    front = await pair()
    engine.trick = other.trick = "dies"
    status, _, text = await front.chat(model=STEERED, stream=True)
    assert (status, "engine_failed" in text) == (200, True)
    assert len(engine.seen) + len(other.seen) == 1


async def test_failing_engine_is_skipped_and_tried_again(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any, until: Until
) -> None:
    """After several failures in a row its breaker opens; one successful request closes it again."""
    front = await pair(**{"gateway.breaker_failures": 2, "gateway.breaker_open_s": 0.2})
    other.trick = "busy"

    async def is_open() -> bool:
        await served(front)
        return (await engines(front))[1]["breaker"] != "closed"

    await until(is_open)
    other.trick = ""

    async def closed() -> bool:
        await served(front)
        return (await engines(front))[1]["breaker"] == "closed"

    await until(closed)
    assert other.seen


def test_half_open_breaker_lets_one_request_through() -> None:
    """Closed, open, half open: one request passes, and its result decides."""
    now = [0.0]
    breaker = Breaker(2, 5.0, lambda: now[0])
    breaker.failed()
    breaker.worked()
    breaker.failed()
    assert breaker.allows
    breaker.failed()
    assert (breaker.state, breaker.allows) == ("open", False)
    now[0] = 5.0
    assert (breaker.state, breaker.allows) == ("half_open", True)
    breaker.begin()
    assert not breaker.allows
    breaker.undecided()
    assert breaker.allows
    breaker.begin()
    breaker.failed()
    assert not breaker.allows
    now[0] = 10.0
    breaker.begin()
    breaker.worked()
    assert (breaker.state, breaker.allows) == ("closed", True)


async def test_engine_that_joins_is_proven_and_loaded_before_it_is_asked(
    start: Start, engine: FakeEngine, other: Any, until: Until
) -> None:
    """While the other engine serves. An engine that fails its self-test does not join."""
    front = await start("calm", **{"engine.url": [engine.url, other.url]})
    first = await served(front)
    other.trick = "selftest_fails"
    await other.up()

    async def tried() -> bool:
        return any("nothing changed" in (shown["reason"] or "") for shown in await engines(front))

    await until(tried)
    assert {await served(front) for _ in range(4)} == {first}
    assert other.seen == []
    other.trick = ""
    await until(ready(front, 2))
    assert len(other.plans) == 1
    assert {await served(front) for _ in range(4)} == {first}
    assert other.seen


async def test_engine_with_other_special_tokens_does_not_join(
    start: Start, engine: FakeEngine, other: Any, until: Until
) -> None:
    """All engines must neutralize the caller's text in the same way."""
    front = await start("calm", **{"engine.url": [engine.url, other.url]})
    other.special = SpecialTokenList(ids={"<|other|>": 0})
    await other.up()

    async def reported() -> bool:
        return any("other special tokens" in (shown["reason"] or "") for shown in await engines(front))

    await until(reported)
    assert await front.engine_ready()
    assert other.seen == []


async def test_engine_of_another_model_does_not_join(
    start: Start, engine: FakeEngine, other: Any, until: Until
) -> None:
    """All engines must serve one model; the error names the engine that serves another."""
    front = await start("calm", **{"engine.url": [engine.url, other.url]})
    other.trick = "other_model"
    await other.up()

    async def reported() -> bool:
        reasons = [shown["reason"] or "" for shown in await engines(front)]
        return any("all engines of a gateway must serve one model" in reason for reason in reasons)

    await until(reported)
    assert await front.engine_ready()


async def test_gateway_is_ready_while_one_engine_is(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any, until: Until
) -> None:
    """The gateway becomes not ready only when the last engine is lost."""
    front = await pair()
    other.trick = "unhealthy"
    await until(ready(front, 1))
    assert await front.engine_ready()
    assert metric(front, f'interpretops_engine_ready{{engine="{other.socket}"}} 0.0')
    engine.trick = "unhealthy"
    await until(ready(front, 0))
    assert not await front.engine_ready()
    assert metric(front, "interpretops_ready 0.0")


async def test_engines_follow_a_dns_name(
    start: Start, engine: FakeEngine, other: Any, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each address of the DNS name is an engine; a removed one finishes its requests."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    listed = ["127.0.0.1"]
    engine.tcp, other.tcp = ("127.0.0.1", port), ("127.0.0.2", port)
    await engine.restart()
    await other.up()
    real = socket.getaddrinfo

    def resolve(host: str, *args: Any, **kwargs: Any) -> list[tuple[Any, ...]]:
        if host != "engines.internal":
            return real(host, *args, **kwargs)
        if not listed:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [answer for address in listed for answer in real(address, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fleet_loop, "_RESOLVE_EVERY_S", 0.1)
    front = await start("calm", **{"engine.url": f"dns+http://engines.internal:{port}"})
    listed.append("127.0.0.2")
    await until(ready(front, 2))
    assert [shown["name"] for shown in await engines(front)] == [f"127.0.0.1:{port}", f"127.0.0.2:{port}"]
    engine.trick = other.trick = "hold_stream"
    held = [asyncio.create_task(front.chat(model=STEERED, stream=True)) for _ in range(2)]
    await asyncio.gather(engine.arrived.wait(), other.arrived.wait())
    listed.remove("127.0.0.1")
    await until(ready(front, 1))
    engine.trick = other.trick = ""
    engine.go_on.set()
    other.go_on.set()
    assert all("[DONE]" in text for _, _, text in await asyncio.gather(*held))
    before = len(engine.seen)
    assert 503 not in {await served(front) for _ in range(3)}
    assert len(engine.seen) == before
    assert not metric(front, 'engine="127.0.0.1')
    listed.clear()

    async def unresolved() -> bool:
        return any(line["event"] == "engines_not_resolved" for line in front.log)

    await until(unresolved)
    assert await front.engine_ready()
    assert metric(front, "interpretops_engines_unresolved 1.0")
    listed.append("127.0.0.2")

    async def resolved() -> bool:
        return any(line["event"] == "engines_resolved" for line in front.log)

    await until(resolved)
    assert metric(front, "interpretops_engines_unresolved 0.0")
    reported = [line["event"] for line in front.log if line["event"].startswith("engines_")]
    assert reported == ["engines_not_resolved", "engines_resolved"]


async def test_engine_that_lost_a_revision_leaves_its_requests_to_the_other(
    pair: Callable[..., Awaitable[Front]], engine: FakeEngine, other: Any, until: Until
) -> None:
    """No request fails: the other engine answers, neither breaker opens, and the plan is loaded again."""
    front = await pair(**{"gateway.watch_policies": False, "gateway.breaker_failures": 1})
    engine.plans.clear()
    for _ in range(4):
        assert await served(front) != 503
    shown = {entry["name"]: entry for entry in await engines(front)}
    assert {entry["breaker"] for entry in shown.values()} == {"closed"}

    async def loaded() -> bool:
        return bool(engine.plans)

    await until(loaded)


async def test_engine_that_cannot_hold_a_plan_joins_without_it(
    start: Start, engine: FakeEngine, other: Any, until: Until
) -> None:
    """A full table keeps an engine from serving one revision, but not the others."""
    front = await start("calm", **{"engine.url": [engine.url, other.url]})
    other.trick = "table_full"
    await other.up()
    await until(ready(front, 2))
    shown = {entry["name"]: entry["revisions"] for entry in await engines(front)}
    assert (len(shown[str(engine.socket)]), shown[str(other.socket)]) == (1, [])
    assert metric(front, f'interpretops_engine_unattested_total{{engine="{other.socket}"}} 1.0')
    for _ in range(4):
        assert await served(front) != 503
        assert (await front.chat())[0] == 200
    assert {seen["vllm_xargs"]["interpretops_revision"] for seen in other.seen} == {"none"}
