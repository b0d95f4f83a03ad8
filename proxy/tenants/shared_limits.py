"""What tenants have used, counted in Redis, so that several gateways keep one limit together."""

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
"""Questions that Redis is asked at once, each on a connection of its own. The others wait for their turn."""
_CONNECTIONS: Final = _AT_A_TIME + 2
"""What is owed and the look whether Redis counts need no turn."""
_LOOK_EVERY_S: Final = 1.0
_LOOK: Final = f"{_PREFIX}look"
"""A bucket that nobody draws on, to see whether Redis counts."""
_BUDGET_KEPT_S: Final = 40 * 86400
"""Longer than the longest period of a budget."""
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
"""Fills a bucket evenly up to now by Redis' own clock, and takes out what is in it: all at once or nothing.
A bucket that nobody has drawn on until it must be full is forgotten, which is the same as a full one."""

T = TypeVar("T")


class _UnansweredError(Exception):
    """Redis has not answered, or was not asked since it is away."""


class Silence:
    """Knows whether Redis is away: it has counted nothing for a while, although it was asked.

    By time and not by the number of failures: one slow moment fails all who are waiting in it.
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
        self._since: float | None = None
        """When it first failed to answer, of the failures since its last answer."""
        self.away = False
        metrics.limits_away.set_function(lambda: self.away)

    def broken(self) -> None:
        """It has answered."""
        self._since = None
        if self.away:
            self.away = False
            self._log.info("limits_back")

    def lasts(self, error: BaseException, then: str) -> None:
        """It has not answered, or with an error."""
        self._metrics.limits_unanswered.inc()
        now = self._clock()
        if self._since is None:
            self._since = now
        if not self.away and now - self._since >= self._away_after_s:
            self.away = True
            self._log.error("limits_away", error=type(error).__name__, then=then)


class SharedCounts:
    """Buckets and budgets in Redis. Where it does not answer, the settings say what happens."""

    def __init__(
        self, settings: SharedLimits, metrics: Metrics, log: FilteringBoundLogger, *, for_everybody: bool
    ) -> None:
        """``for_everybody``: whether no caller is without limits that are counted here.

        Raises `ConfigError` when the client library is missing.
        """
        assert settings.redis_url is not None
        self._settings = settings
        self._for_everybody = for_everybody
        self._redis = _connect(settings.redis_url.get_secret_value(), settings.timeout_s)
        self._draw = self._redis.register_script(_DRAW)
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._silence = Silence(settings.away_after_s, metrics, log)
        self._owed_tokens: Counter[tuple[str, int]] = Counter()
        """Tenant and size of its bucket, to the tokens that must still be taken from it."""
        self._owed_budget: Counter[tuple[str, str]] = Counter()
        """Tenant and period, to the tokens that must still be counted."""
        self._owing = asyncio.Event()

    async def draw(self, tenant: str, kind: str, size: int, amount: int) -> float | None:
        """What a bucket held before ``amount`` was taken from it, or what it holds when that is too little.

        None when Redis does not answer and every gateway counts for itself then. Raises `LimitsUnavailable`.
        """
        answer = await self._ask(lambda: self._draw(keys=[_bucket(tenant, kind)], args=[size, amount, 0]))
        if answer is None:
            return None
        drawn, level = answer
        return float(level) + (amount if drawn else 0)

    async def used(self, tenant: str, period: str) -> int | None:
        """Tokens used of a budget; None and errors as in `draw`."""
        found = await self._ask(lambda: self._get(_budget(tenant, period)))
        return None if found is None else found + self._owed_budget[tenant, period]

    def settle(self, tenant: str, *, bucket: tuple[int, int] | None, budget: tuple[str, int] | None) -> None:
        """Count soon what a request used: ``bucket`` is size and amount, ``budget`` is period and amount."""
        if bucket is not None:
            self._owed_tokens[tenant, bucket[0]] += bucket[1]
        if budget is not None:
            self._owed_budget[tenant, budget[0]] += budget[1]
        if bucket is not None or budget is not None:
            self._owing.set()

    def not_ready(self) -> Iterator[Reason]:
        """Why every request is refused. Where some callers have no such limits, these are served."""
        if self._silence.away and self._settings.when_away == "refuse" and self._for_everybody:
            yield Reason("limits_away", "Redis does not answer, and everybody's use is counted there")

    async def keep(self, alive: Callable[[], None]) -> None:
        """Write what is owed, until cancelled; what Redis does not take is kept for later.

        Where nothing is owed, looks once a second whether Redis counts: nobody may ask when it is back.
        """
        while True:
            try:
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await self._owing.wait()
            except TimeoutError:
                await self._look()
                alive()
                continue
            self._owing.clear()
            paid = False
            try:
                paid = await self._pay()
            finally:
                if not paid:
                    self._owing.set()
            alive()
            if not paid:
                await asyncio.sleep(_LOOK_EVERY_S)

    async def close(self) -> None:
        """Write what is still owed, if Redis takes it."""
        await self._pay()
        await self._redis.aclose()

    async def _pay(self) -> bool:
        try:
            for (tenant, size), amount in list(self._owed_tokens.items()):
                await self._draw(keys=[_bucket(tenant, "tokens")], args=[size, amount, 1])
                self._silence.broken()
                self._owed_tokens[tenant, size] -= amount
                _drop_if_paid(self._owed_tokens, (tenant, size))
            for (tenant, period), amount in list(self._owed_budget.items()):
                async with self._redis.pipeline(transaction=True) as both:
                    both.incrby(_budget(tenant, period), amount)
                    both.expire(_budget(tenant, period), _BUDGET_KEPT_S)
                    await both.execute()
                self._silence.broken()
                self._owed_budget[tenant, period] -= amount
                _drop_if_paid(self._owed_budget, (tenant, period))
        except _faults() as error:
            self._silence.lasts(error, self._settings.when_away)
            return False
        return True

    async def _look(self) -> None:
        """Let Redis count something: one that answers may still be full, or not allowed to write."""
        try:
            await self._draw(keys=[_LOOK], args=[60, 0, 0])
        except _faults() as error:
            self._silence.lasts(error, self._settings.when_away)
        else:
            self._silence.broken()

    async def _get(self, key: str) -> int:
        return int(await self._redis.get(key) or 0)

    async def _ask(self, question: Callable[[], Awaitable[T]]) -> T | None:
        try:
            return await self._ask_in_turn(question)
        except _UnansweredError:
            if self._settings.when_away == "local":
                return None
        raise LimitsUnavailable("the use of all gateways cannot be counted now; try again in a moment")

    async def _ask_in_turn(self, question: Callable[[], Awaitable[T]]) -> T:
        """However many ask at once: none is told that Redis is away because its connections are in use."""
        if not self._silence.away:
            async with self._turns:
                # It may have been found away meanwhile.
                if not self._silence.away:
                    try:
                        answer = await question()
                    except _faults() as error:
                        self._silence.lasts(error, self._settings.when_away)
                    else:
                        self._silence.broken()
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
    """Ask Redis whether it is there. Raises `OSError` of one line, and `ConfigError` without its client."""
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


def _drop_if_paid(owed: Counter[Any], key: Any) -> None:
    if not owed[key]:
        del owed[key]


def _bucket(tenant: str, kind: str) -> str:
    return f"{_PREFIX}bucket:{kind}:{tenant}"


def _budget(tenant: str, period: str) -> str:
    return f"{_PREFIX}budget:{period}:{tenant}"
