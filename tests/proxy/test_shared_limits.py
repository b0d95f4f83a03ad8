"""Several gateways keep one limit through Redis, and say what happens without it."""

import asyncio
import os
import shutil
import socket

import pytest
from redis.asyncio import Redis

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None and not os.environ.get("CI"),
    reason="needs redis-server (apt-get install redis-server)",
)


class Server:
    """A Redis on a free port, that can be stopped and started again with what it held."""

    def __init__(self, folder):
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"

    async def start(self):
        self.process = await asyncio.create_subprocess_exec(
            *("redis-server", "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--dir", str(self._folder), "--appendonly", "yes", "--appendfsync", "always", "--save", ""),
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(20):
            while not await self._answers():  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.05)

    async def _answers(self):
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.write(b"PING\r\n")
        answer = await reader.readline()
        writer.close()
        return answer == b"+PONG\r\n"

    async def stop(self):
        if self.process.returncode is None:
            self.process.terminate()
        await self.process.wait()


@pytest.fixture
async def redis(tmp_path):
    server = Server(tmp_path)
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def gateways(start, redis):
    """Two gateways that count together."""

    async def run(when_away="refuse", **limits):
        wish = {
            "limits.redis_url": redis.url,
            "limits.when_away": when_away,
            "limits.timeout_s": 5,
            "tenants": [{"id": "anonymous", "limits": limits}],
        }
        return [await start("calm", **wish), await start("calm", **wish)]

    return run


async def code(front, **fields):
    status, _, body = await front.chat(**fields)
    return body["error"]["code"] if status != 200 else 200


async def left(front, of):
    return int((await front.chat())[1][f"x-ratelimit-remaining-{of}"])


async def test_requests_a_minute_are_those_of_all_gateways(gateways):
    """What one has served, the others may not serve again; headers tell what all have left."""
    one, other = await gateways(requests_per_minute=3)
    assert [await left(one, "requests"), await left(other, "requests"), await left(one, "requests")] == [
        2,
        1,
        0,
    ]
    assert [await code(one), await code(other)] == ["rate_limit_exceeded"] * 2


async def test_tokens_a_minute_are_those_of_all_gateways(gateways, engine, until):
    """What a request set aside at one gateway is put right for all when it ends."""
    engine.more = {"cached_tokens": 897}
    one, other = await gateways(tokens_per_minute=1000)
    assert await code(one, max_tokens=10) == 200

    async def settled():
        return await code(other, max_tokens=500) == "rate_limit_exceeded"

    await until(settled)
    assert await code(one, max_tokens=500) == "rate_limit_exceeded"


async def test_budget_is_that_of_all_gateways(gateways, engine, until):
    """Spent at one gateway it is spent at the other, and with a new gateway too."""
    engine.more = {"cached_tokens": 97}
    one, other = await gateways(token_budget=100)
    assert await code(one) == 200

    async def spent():
        return await code(other) == "insufficient_quota"

    await until(spent)
    (fresh, _) = await gateways(token_budget=100)
    assert await code(fresh) == "insufficient_quota"


async def test_without_redis_limited_requests_are_refused(gateways, engine, redis, until):
    """By default nothing is served uncounted; when it is back, everything goes on."""
    one, _ = await gateways(requests_per_minute=1000)
    assert await code(one) == 200
    await redis.stop()
    assert await code(one) == "limits_unavailable"
    assert "interpretops_limits_away 1.0" in one.apps.gateway.metrics.render().decode()
    assert len(engine.seen) == 1
    await redis.start()

    async def back():
        return await code(one) == 200

    await until(back)
    assert "interpretops_limits_away 0.0" in one.apps.gateway.metrics.render().decode()


async def test_without_redis_each_gateway_may_count_for_itself(gateways, engine, redis, until):
    """It begins with what it heard last, and tells Redis afterwards what was used meanwhile."""
    engine.more = {"cached_tokens": 497}
    one, other = await gateways("local", requests_per_minute=3, token_budget=1200)
    assert await code(one) == 200
    await redis.stop()
    assert [await code(one), await code(one), await code(one)] == [200, 200, "rate_limit_exceeded"]
    await redis.start()

    async def told():
        async with Redis.from_url(redis.url) as client:
            return [int(await client.get(key)) async for key in client.scan_iter("*:budget:*")] == [1500]

    await until(told)
    assert await code(other) == "insufficient_quota"


async def test_tenant_without_limits_needs_no_redis(gateways, redis):
    """Only what is counted depends on it."""
    one, _ = await gateways(concurrency=5)
    await redis.stop()
    assert await code(one) == 200
