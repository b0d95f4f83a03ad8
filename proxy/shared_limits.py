"""What tenants have used, counted in Redis, so that several gateways keep one limit together."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from structlog.typing import FilteringBoundLogger

from interpretops.errors import ConfigError
from interpretops.settings_access import SharedLimits
from proxy.breaker import Breaker
from proxy.metrics import Metrics
from proxy.refusal import LimitsUnavailable

if TYPE_CHECKING:
    from redis.asyncio import Redis

_PREFIX: Final = "interpretops:"
_AWAY_S: Final = 1.0
"""How long Redis is not asked after it did not answer."""
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


class SharedCounts:
    """Buckets and budgets in Redis. Where it does not answer, the settings say what happens."""

    def __init__(self, settings: SharedLimits, metrics: Metrics, log: FilteringBoundLogger) -> None:
        """Raises `ConfigError` when the client library is missing."""
        assert settings.redis_url is not None
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._redis = _connect(settings.redis_url.get_secret_value(), settings.timeout_s)
        self._draw = self._redis.register_script(_DRAW)
        self._breaker = Breaker(1, _AWAY_S)
        self._owed_tokens: Counter[tuple[str, int]] = Counter()
        """Tenant and size of its bucket, to the tokens that must still be taken from it."""
        self._owed_budget: Counter[tuple[str, str]] = Counter()
        """Tenant and period, to the tokens that must still be counted."""
        self._owing = asyncio.Event()

    async def draw(self, tenant: str, kind: str, size: int, amount: int) -> float | None:
        """What a bucket held before ``amount`` was taken from it, or what it holds when that is too little.

        None when Redis does not answer and every gateway counts for itself then. Raises `LimitsUnavailable`.
        """
        answer = await self._ask(self._draw(keys=[_bucket(tenant, kind)], args=[size, amount, 0]))
        if answer is None:
            return None
        drawn, level = answer
        return float(level) + (amount if drawn else 0)

    async def used(self, tenant: str, period: str) -> int | None:
        """Tokens used of a budget; None and errors as in `draw`."""
        found = await self._ask(self._get(_budget(tenant, period)))
        return None if found is None else found + self._owed_budget[tenant, period]

    def settle(self, tenant: str, *, bucket: tuple[int, int] | None, budget: tuple[str, int] | None) -> None:
        """Count soon what a request used: ``bucket`` is size and amount, ``budget`` is period and amount."""
        if bucket is not None:
            self._owed_tokens[tenant, bucket[0]] += bucket[1]
        if budget is not None:
            self._owed_budget[tenant, budget[0]] += budget[1]
        self._owing.set()

    async def keep(self) -> None:
        """Write what is owed, until cancelled; what Redis does not take is kept for later."""
        while True:
            await self._owing.wait()
            self._owing.clear()
            if not await self._pay():
                await asyncio.sleep(_AWAY_S)
                self._owing.set()

    async def close(self) -> None:
        """Write what is still owed, if Redis takes it."""
        await self._pay()
        await self._redis.aclose()

    async def _pay(self) -> bool:
        try:
            for (tenant, size), amount in list(self._owed_tokens.items()):
                await self._draw(keys=[_bucket(tenant, "tokens")], args=[size, amount, 1])
                self._owed_tokens[tenant, size] -= amount
                _drop_if_paid(self._owed_tokens, (tenant, size))
            for (tenant, period), amount in list(self._owed_budget.items()):
                async with self._redis.pipeline(transaction=True) as both:
                    both.incrby(_budget(tenant, period), amount)
                    both.expire(_budget(tenant, period), _BUDGET_KEPT_S)
                    await both.execute()
                self._owed_budget[tenant, period] -= amount
                _drop_if_paid(self._owed_budget, (tenant, period))
        except _faults() as error:
            self._note_away(error)
            return False
        self._note_there()
        return True

    async def _get(self, key: str) -> int:
        return int(await self._redis.get(key) or 0)

    async def _ask(self, question: Awaitable[T]) -> T | None:
        if self._breaker.allows:
            self._breaker.begin()
            try:
                answer = await question
            except _faults() as error:
                self._note_away(error)
            else:
                self._note_there()
                return answer
        else:
            with contextlib.suppress(AttributeError):
                question.close()  # type: ignore[attr-defined] # a coroutine that is never awaited
        if self._settings.when_away == "refuse":
            raise LimitsUnavailable("the use of all gateways cannot be counted now; try again in a moment")
        return None

    def _note_away(self, error: BaseException) -> None:
        if self._breaker.state == "closed":
            self._log.error("limits_away", error=type(error).__name__, then=self._settings.when_away)
        self._breaker.failed()
        self._metrics.limits_away.set(1)

    def _note_there(self) -> None:
        if self._breaker.state != "closed":
            self._log.info("limits_back")
        self._breaker.worked()
        self._metrics.limits_away.set(0)


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
        url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s, retry=never
    )
    return client


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
