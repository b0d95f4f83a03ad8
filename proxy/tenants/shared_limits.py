"""Counts tenants' usage in Redis, so that several gateways share one limit."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from structlog.typing import FilteringBoundLogger

from interpretops.errors import ConfigError
from interpretops.settings.access import SharedLimits
from proxy.errors import LimitsUnavailable
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Reason

if TYPE_CHECKING:
    from redis.asyncio import Redis

_PREFIX: Final = "interpretops:"
_AT_A_TIME: Final = 32
"""Concurrent queries to Redis, each on its own connection. Further queries wait."""
_CONNECTIONS: Final = _AT_A_TIME + 2
"""Writing pending usage and the health probe need no query slot."""
_PROBE_EVERY_S: Final = 1.0
_PROBE_KEY: Final = f"{_PREFIX}look"
"""A bucket that no tenant uses, to probe whether Redis can count."""
_BUDGET_KEPT_S: Final = 40 * 86400
"""Longer than the longest budget period."""
_DRAW: Final = """
local size, amount, forced = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3] == '1'
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local kept = redis.call('HMGET', KEYS[1], 'level', 'stamp')
local level, stamp = tonumber(kept[1] or size), tonumber(kept[2] or now)
level = math.min(size, level + math.max(0, now - stamp) * size / 60)
local drawn = forced or level >= amount
if drawn then level = math.min(size, level - amount) end
redis.call('HSET', KEYS[1], 'level', string.format('%.17g', level), 'stamp', string.format('%.17g', now))
redis.call('EXPIRE', KEYS[1], math.ceil((size - level) * 60 / size) + 60)
return {drawn and 1 or 0, string.format('%.17g', level)}
"""
"""Refills a bucket by Redis' own clock, then takes out the amount if it is there, or always if forced.
A bucket unused until it must be full expires: a missing bucket counts as full."""

T = TypeVar("T")


class _UnansweredError(Exception):
    """Redis did not answer, or was not asked because it is unreachable."""


class RedisHealth:
    """Decides whether Redis is unreachable: no query has succeeded for a while, although there were some.

    Decides by time, not by number of failures: one slow moment fails every query that waits in it.
    """

    def __init__(
        self,
        away_after_s: float,
        metrics: Metrics,
        log: FilteringBoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._away_after_s = away_after_s
        self._metrics = metrics
        self._log = log
        self._clock = clock
        self._failing_since: float | None = None
        """Time of the first failure since the last success."""
        self.unreachable = False
        metrics.limits_away.set_function(lambda: self.unreachable)

    def answered(self) -> None:
        """A query succeeded."""
        self._failing_since = None
        if self.unreachable:
            self.unreachable = False
            self._log.info("limits_back")

    def failed(self, error: BaseException, then: str) -> None:
        """A query got no answer, or an error."""
        self._metrics.limits_unanswered.inc()
        now = self._clock()
        if self._failing_since is None:
            self._failing_since = now
        if not self.unreachable and now - self._failing_since >= self._away_after_s:
            self.unreachable = True
            self._log.error("limits_away", error=type(error).__name__, then=then)


class SharedCounts:
    """Buckets and budgets in Redis. The settings decide what happens while Redis is unreachable."""

    def __init__(
        self, settings: SharedLimits, metrics: Metrics, log: FilteringBoundLogger, *, for_everybody: bool
    ) -> None:
        """``for_everybody``: whether every tenant has limits that are counted here.

        Raises `ConfigError` when the client library is missing.
        """
        assert settings.redis_url is not None
        self._settings = settings
        self._for_everybody = for_everybody
        self._redis = _connect(settings.redis_url.get_secret_value(), settings.timeout_s)
        self._draw = self._redis.register_script(_DRAW)
        self._query_slots = asyncio.Semaphore(_AT_A_TIME)
        self._redis_health = RedisHealth(settings.away_after_s, metrics, log)
        self._pending_tokens: Counter[tuple[str, int]] = Counter()
        """Tenant and bucket size to the tokens still to be taken from the bucket."""
        self._pending_budget: Counter[tuple[str, str]] = Counter()
        """Tenant and period to the tokens still to be added to the usage."""
        self._has_pending = asyncio.Event()

    async def draw(self, tenant: str, kind: str, size: int, amount: int) -> float | None:
        """The bucket's level before ``amount`` was taken out, or its level if that is too low to take it.

        None if Redis is unreachable and each gateway then counts alone; otherwise raises `LimitsUnavailable`.
        """
        answer = await self._query_or_fall_back(
            lambda: self._draw(keys=[_bucket(tenant, kind)], args=[size, amount, 0])
        )
        if answer is None:
            return None
        drawn, level = answer
        return float(level) + (amount if drawn else 0)

    async def used(self, tenant: str, period: str) -> int | None:
        """Tokens of a budget used so far. None and errors as in `draw`."""
        found = await self._query_or_fall_back(lambda: self._get(_budget(tenant, period)))
        return None if found is None else found + self._pending_budget[tenant, period]

    def settle(self, tenant: str, *, bucket: tuple[int, int] | None, budget: tuple[str, int] | None) -> None:
        """Queue a request's usage for writing. ``bucket``: size and amount; ``budget``: period and amount."""
        if bucket is not None:
            self._pending_tokens[tenant, bucket[0]] += bucket[1]
        if budget is not None:
            self._pending_budget[tenant, budget[0]] += budget[1]
        if bucket is not None or budget is not None:
            self._has_pending.set()

    def not_ready(self) -> Iterator[Reason]:
        """Why every request is refused. Empty if some tenants have no shared limits and are still served."""
        if self._redis_health.unreachable and self._settings.when_away == "refuse" and self._for_everybody:
            yield Reason("limits_away", "Redis is unreachable, and all tenants' usage is counted there")

    async def keep(self, alive: Callable[[], None]) -> None:
        """Write pending usage, until cancelled. What Redis does not accept is kept for later.

        While nothing is pending, probes Redis once a second: otherwise its return could go unnoticed.
        """
        while True:
            try:
                async with asyncio.timeout(_PROBE_EVERY_S):
                    await self._has_pending.wait()
            except TimeoutError:
                await self._probe()
                alive()
                continue
            self._has_pending.clear()
            flushed = False
            try:
                flushed = await self._flush()
            finally:
                if not flushed:
                    self._has_pending.set()
            alive()
            if not flushed:
                await asyncio.sleep(_PROBE_EVERY_S)

    async def close(self) -> None:
        """Write usage that is still pending, if Redis accepts it."""
        await self._flush()
        await self._redis.aclose()

    async def _flush(self) -> bool:
        try:
            for (tenant, size), amount in list(self._pending_tokens.items()):
                await self._draw(keys=[_bucket(tenant, "tokens")], args=[size, amount, 1])
                self._redis_health.answered()
                self._pending_tokens[tenant, size] -= amount
                _drop_if_flushed(self._pending_tokens, (tenant, size))
            for (tenant, period), amount in list(self._pending_budget.items()):
                async with self._redis.pipeline(transaction=True) as both:
                    both.incrby(_budget(tenant, period), amount)
                    both.expire(_budget(tenant, period), _BUDGET_KEPT_S)
                    await both.execute()
                self._redis_health.answered()
                self._pending_budget[tenant, period] -= amount
                _drop_if_flushed(self._pending_budget, (tenant, period))
        except _faults() as error:
            self._redis_health.failed(error, self._settings.when_away)
            return False
        return True

    async def _probe(self) -> None:
        """Make Redis count something: a Redis that answers may still be full or read-only."""
        try:
            await self._draw(keys=[_PROBE_KEY], args=[60, 0, 0])
        except _faults() as error:
            self._redis_health.failed(error, self._settings.when_away)
        else:
            self._redis_health.answered()

    async def _get(self, key: str) -> int:
        return int(await self._redis.get(key) or 0)

    async def _query_or_fall_back(self, question: Callable[[], Awaitable[T]]) -> T | None:
        try:
            return await self._query(question)
        except _UnansweredError:
            if self._settings.when_away == "local":
                return None
        raise LimitsUnavailable("usage limits cannot be checked now; try again in a moment")

    async def _query(self, question: Callable[[], Awaitable[T]]) -> T:
        """Run a query in a slot, so that busy connections are never mistaken for an unreachable Redis."""
        if not self._redis_health.unreachable:
            async with self._query_slots:
                # It may have become unreachable while we waited.
                if not self._redis_health.unreachable:
                    try:
                        answer = await question()
                    except _faults() as error:
                        self._redis_health.failed(error, self._settings.when_away)
                    else:
                        self._redis_health.answered()
                        return answer
        raise _UnansweredError


def _connect(url: str, timeout_s: float) -> Redis:
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError:
        raise ConfigError(
            "limits.redis_url is given, but Redis' client is not installed; install interpretops[redis]"
        ) from None
    never = Retry(NoBackoff(), 0)
    client: Redis = Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        max_connections=_CONNECTIONS,
        retry=never,
    )
    return client


async def ping(limits: SharedLimits) -> None:
    """Check that Redis responds. Raises `OSError` with one line, or `ConfigError` without the client."""
    assert limits.redis_url is not None
    client = _connect(limits.redis_url.get_secret_value(), limits.timeout_s)
    try:
        await client.ping()
    except _faults() as error:
        raise OSError(f"Redis does not answer ({error})") from None
    finally:
        await client.aclose()


def _faults() -> tuple[type[BaseException], ...]:
    from redis.exceptions import RedisError

    return RedisError, OSError, TimeoutError


def _drop_if_flushed(owed: Counter[Any], key: Any) -> None:
    if not owed[key]:
        del owed[key]


def _bucket(tenant: str, kind: str) -> str:
    return f"{_PREFIX}bucket:{kind}:{tenant}"


def _budget(tenant: str, period: str) -> str:
    return f"{_PREFIX}budget:{period}:{tenant}"
