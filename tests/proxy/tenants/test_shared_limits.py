"""Several gateways share limits through Redis; the settings decide what happens without it."""

import asyncio
import os
import shutil
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, TCPConnector
from fake_engine import FakeEngine
from redis.asyncio import Redis
from running_gateway import Front, Start, Until

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None and not os.environ.get("CI"),
    reason="needs redis-server (apt-get install redis-server)",
)


class Server:
    """A Redis server on a free port that can be stopped and restarted with its data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "always", "--save", ""),
            stdout=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(20):
            while b"Ready to accept connections" not in (line := await self.process.stdout.readline()):
                assert line, "redis-server has ended"

    async def stop(self) -> None:
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Any]:
    server = Server(tmp_path)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def gateways(start: Start, redis: Any) -> Callable[..., Awaitable[list[Front]]]:
    """Two gateways that share limits."""

    async def run(when_away: str = "refuse", timeout_s: float = 5, **limits: int) -> list[Front]:
        wish = {
            "limits.redis_url": redis.url,
            "limits.when_away": when_away,
            "limits.timeout_s": timeout_s,
            "tenants": [{"id": "anonymous", "limits": limits}],
        }
        return [await start("calm", **wish), await start("calm", **wish)]

    return run


async def code(front: Front, **fields: int) -> int | str:
    status, _, body = await front.chat(**fields)
    return body["error"]["code"] if status != 200 else 200


async def left(front: Front, of: str) -> int:
    return int((await front.chat())[1][f"x-ratelimit-remaining-{of}"])


async def test_requests_a_minute_are_those_of_all_gateways(
    gateways: Callable[..., Awaitable[list[Front]]],
) -> None:
    """Requests served by one gateway count for the other; headers report what all have left."""
    one, other = await gateways(requests_per_minute=3)
    assert [await left(one, "requests"), await left(other, "requests"), await left(one, "requests")] == [
        2,
        1,
        0,
    ]
    assert [await code(one), await code(other)] == ["rate_limit_exceeded"] * 2


async def test_tokens_a_minute_are_those_of_all_gateways(
    gateways: Callable[..., Awaitable[list[Front]]], engine: FakeEngine, until: Until
) -> None:
    """A request's reservation at one gateway is corrected for all when it ends."""
    engine.more = {"cached_tokens": 897}
    one, other = await gateways(tokens_per_minute=1000)
    assert await code(one, max_tokens=10) == 200

    async def settled() -> bool:
        return await code(other, max_tokens=500) == "rate_limit_exceeded"

    await until(settled)
    assert await code(one, max_tokens=500) == "rate_limit_exceeded"


async def test_budget_is_that_of_all_gateways(
    gateways: Callable[..., Awaitable[list[Front]]], engine: FakeEngine, until: Until
) -> None:
    """Budget spent at one gateway is spent at the other, and at a new one."""
    engine.more = {"cached_tokens": 97}
    one, other = await gateways(token_budget=100)
    assert await code(one) == 200

    async def spent() -> bool:
        return await code(other) == "insufficient_quota"

    await until(spent)
    (fresh, _) = await gateways(token_budget=100)
    assert await code(fresh) == "insufficient_quota"


async def test_without_redis_limited_requests_are_refused(
    gateways: Callable[..., Awaitable[list[Front]]], engine: FakeEngine, redis: Any, until: Until
) -> None:
    """By default nothing is served uncounted, and the gateway is not ready until Redis is back."""
    one, _ = await gateways(requests_per_minute=1000)
    assert await code(one) == 200
    await redis.stop()
    assert await code(one) == "limits_unavailable"
    assert len(engine.seen) == 1

    async def reported() -> bool:
        async with one.public.get("/readyz") as answer:
            return (await answer.json())["reasons"] == ["limits_away"]

    await until(reported)
    assert away(one)
    await redis.start()
    # A not-ready endpoint gets no requests, so it must detect recovery by itself.
    await until(one.engine_ready)
    assert not away(one)
    assert await code(one) == 200


async def test_redis_that_cannot_write_counts_as_unreachable(
    gateways: Callable[..., Awaitable[list[Front]]], redis: Any, until: Until
) -> None:
    """A Redis that runs but refuses writes counts as unreachable, although PING succeeds."""
    one, _ = await gateways(requests_per_minute=1000)
    async with Redis.from_url(redis.url) as client:
        await client.config_set("maxmemory", "1")
        assert await client.ping()

        async def reported() -> bool:
            return away(one)

        await until(reported)
        assert not await one.engine_ready()
        await client.config_set("maxmemory", "0")
    await until(one.engine_ready)


async def test_client_that_disconnects_during_a_query_frees_its_slot(
    gateways: Callable[..., Awaitable[list[Front]]], redis: Any, until: Until
) -> None:
    """A client that disconnects during a query frees its query slot."""
    one, _ = await gateways(requests_per_minute=1000)
    async with Redis.from_url(redis.url) as client:
        await client.execute_command("CLIENT", "PAUSE", 1000, "ALL")
        gone = [asyncio.create_task(code(one)) for _ in range(60)]

        async def asked() -> bool:
            return one.apps.gateway.limiter._shared._query_slots.locked()

        await until(asked)
        for task in gone:
            task.cancel()
        await asyncio.gather(*gone, return_exceptions=True)
        await client.ping()
    assert await code(one) == 200

    async def all_free() -> bool:
        return one.apps.gateway.limiter._shared._query_slots._value == 32

    await until(all_free)


async def test_without_redis_each_gateway_may_count_for_itself(
    gateways: Callable[..., Awaitable[list[Front]]], engine: FakeEngine, redis: Any, until: Until
) -> None:
    """Each gateway starts from the last known counts, and writes its usage to Redis afterwards."""
    engine.more = {"cached_tokens": 497}
    one, other = await gateways("local", requests_per_minute=3, token_budget=1200)
    assert await code(one) == 200
    await redis.stop()
    assert [await code(one), await code(one), await code(one)] == [200, 200, "rate_limit_exceeded"]
    await redis.start()

    async def reported() -> bool:
        async with Redis.from_url(redis.url) as client:
            return [int(await client.get(key)) async for key in client.scan_iter("*:budget:*")] == [1500]

    await until(reported)
    assert await code(other) == "insufficient_quota"


async def test_tenant_without_limits_needs_no_redis(
    gateways: Callable[..., Awaitable[list[Front]]], redis: Any, until: Until
) -> None:
    """Only tenants with limits depend on Redis; the gateway is ready for the others."""
    one, _ = await gateways(concurrency=5)
    await redis.stop()
    assert await code(one) == 200

    async def reported() -> bool:
        return away(one)

    await until(reported)
    assert await code(one) == 200
    assert await one.engine_ready()


def away(front: Front) -> bool:
    """Whether the metric reports Redis as unreachable."""
    return "interpretops_limits_away 1.0" in front.apps.gateway.metrics.render().decode()


async def test_many_concurrent_requests_are_all_counted(
    gateways: Callable[..., Awaitable[list[Front]]],
) -> None:
    """However many requests arrive at once, none is refused and none is uncounted."""
    one, other = await gateways(requests_per_minute=600)
    body = {"model": "tiny-model", "messages": []}
    unbounded = TCPConnector(limit=0)
    async with ClientSession(one.public._base_url, connector=unbounded) as session:

        async def status() -> int:
            async with session.post("/v1/chat/completions", json=body) as answer:
                return answer.status

        assert Counter(await asyncio.gather(*(status() for _ in range(400)))) == {200: 400}
    assert not away(one)
    assert await left(other, "requests") < 400


@pytest.mark.parametrize("when_away", ["refuse", "local"])
async def test_one_slow_answer_is_not_an_outage(
    gateways: Callable[..., Awaitable[list[Front]]], redis: Any, when_away: str
) -> None:
    """Requests that time out while Redis pauses get an error; later ones are counted."""
    (one, other) = await gateways(when_away, timeout_s=0.2, requests_per_minute=200)
    assert await code(one) == 200
    async with Redis.from_url(redis.url) as client:
        await client.execute_command("CLIENT", "PAUSE", 500, "ALL")
        met = await asyncio.gather(*(code(one) for _ in range(50)))
        await client.ping()
    assert set(met) <= {200, "limits_unavailable"}
    assert ("limits_unavailable" in met) is (when_away == "refuse")
    before = await left(other, "requests")
    assert [await code(one) for _ in range(20)] == [200] * 20
    assert await left(other, "requests") < before - 10
    assert not away(one)
    assert not [line for line in one.log if line["event"] == "limits_away"]


async def test_outage_is_reported_without_interruption(
    gateways: Callable[..., Awaitable[list[Front]]], redis: Any, until: Until
) -> None:
    """From start to end of the outage the gauge is 1 and the log has one line, whatever requests finish
    meanwhile."""
    one, _ = await gateways("local", requests_per_minute=10_000)
    assert await code(one) == 200
    await redis.stop()

    async def reported() -> bool:
        await code(one)
        return away(one)

    await until(reported)
    for _ in range(300):
        assert await code(one) == 200
        assert away(one)
    await redis.start()

    async def back() -> bool:
        return not away(one)

    await until(back)
    assert [line["event"] for line in one.log if line["event"].startswith("limits_")] == [
        "limits_away",
        "limits_back",
    ]
