"""Limits per tenant: requests and tokens a minute, concurrent requests, and tokens per period.

Each gateway decides by its own buckets. With Redis, it first synchronises them with the shared ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from interpretops.settings import Limits, Tenant
from proxy.errors import BudgetSpent, InvalidRequest, RateLimited
from proxy.openai_api.request_size import Size
from proxy.tenants.budget import Budgets
from proxy.tenants.shared_limits import SharedCounts


class Bucket:
    """A token bucket that refills evenly over a minute. Its level may go below zero."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.size = per_minute
        self._level = float(per_minute)
        self._stamp = now

    def level(self, now: float) -> float:
        """The current level."""
        self._level = min(self.size, self._level + max(0.0, now - self._stamp) * self.size / 60)
        self._stamp = now
        return self._level

    def correct(self, level: float, now: float) -> None:
        """Set the level to what all gateways together have left."""
        self._level, self._stamp = level, now

    def draw(self, amount: float, now: float) -> None:
        """Take tokens out; a negative amount puts them back."""
        self._level = min(self.size, self.level(now) - amount)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until the level reaches ``amount``."""
        return max(0.0, (amount - self.level(now)) * 60 / self.size)


class Meter:
    """Counts one tenant's usage."""

    def __init__(
        self,
        tenant: str,
        limits: Limits,
        budgets: Budgets,
        clock: Callable[[], float],
        shared: SharedCounts | None,
    ) -> None:
        now = clock()
        self._shared = shared
        self._counted = False
        """Whether Redis has already counted the tokens of the next `reserve`."""
        self._tenant = tenant
        self._limits = limits
        self._budgets = budgets
        self._clock = clock
        self._requests = _bucket(limits.requests_per_minute, now)
        self._tokens = _bucket(limits.tokens_per_minute, now)
        self.in_flight = 0
        """Answers in progress. A request counts once for each of its answers."""
        self._reserved = 0
        """Tokens reserved for requests in progress."""

    async def sync_requests(self, number: int = 1) -> None:
        """Draw on the bucket shared by all gateways, so that `ConcurrencySlots` sees what is left there."""
        limits = self._limits
        if self._shared is None or self._requests is None or number > self._requests.size:
            return
        if limits.concurrency is None or self.in_flight + number <= limits.concurrency:
            await self._sync(self._shared, "requests", self._requests, number)

    async def sync_tokens(self, size: Size) -> None:
        """As `sync_requests`, for `reserve`."""
        shared, limit, period = self._shared, self._limits.token_budget, self._limits.budget_period
        if shared is None:
            return
        if limit is not None:
            used = await shared.used(self._tenant, self._budgets.period(period))
            if used is not None:
                self._budgets.correct(self._tenant, period, used)
            if self._left() < size.budget_tokens:
                return
        if self._tokens is not None:
            amount = min(size.tokens, self._tokens.size)
            await self._sync(shared, "tokens", self._tokens, amount)

    async def _sync(self, shared: SharedCounts, kind: str, bucket: Bucket, amount: int) -> None:
        level = await shared.draw(self._tenant, kind, bucket.size, amount)
        self._counted = level is not None
        if level is not None:
            bucket.correct(level, self._clock())

    @contextmanager
    def request(self) -> Iterator[ConcurrencySlots]:
        """Count one request as in progress for the block. Raises `RateLimited` when there are too many."""
        slots = ConcurrencySlots(self)
        slots.take(1)
        try:
            yield slots
        finally:
            self.in_flight -= slots.taken

    def admit(self, number: int, more: int) -> None:
        """Count ``more`` answers of a request that has ``number`` in all, or refuse it."""
        limits, now = self._limits, self._clock()
        if limits.concurrency is not None and self.in_flight + more > limits.concurrency:
            if number > limits.concurrency:
                raise _never_allowed(
                    f"asks for {number} answers", f"{limits.concurrency} are allowed at a time"
                )
            raise RateLimited(
                f"{self.in_flight} requests are in progress, and at most {limits.concurrency} are allowed "
                "at a time; wait for one to end",
                retry_after_s=1.0,
                headers=self.headers(),
            )
        if self._requests is not None:
            if number > self._requests.size:
                raise _never_allowed(
                    f"counts as {number} requests", f"{self._requests.size} are allowed a minute"
                )
            wait_s = self._requests.wait_s(more, now)
            if wait_s > 0:
                raise RateLimited(
                    f"at most {self._requests.size} requests are allowed a minute; try again in "
                    f"{_duration(wait_s)}",
                    retry_after_s=wait_s,
                    headers=self.headers(),
                )
            self._requests.draw(more, now)
        self.in_flight += more

    def reserve(self, size: Size) -> Charge:
        """Reserve the tokens that a request may use. Refuses a request over a limit."""
        self._check_budget(size)
        drawn = size.tokens
        if self._tokens is not None:
            now = self._clock()
            if size.requests > 1 and size.tokens > self._tokens.size:
                raise _never_allowed(
                    f"may use {size.tokens} tokens for {size.requests} answers",
                    f"{self._tokens.size} are allowed a minute",
                )
            # A single answer larger than the bucket is admitted when the bucket is full; later requests wait
            # longer for it.
            drawn = min(drawn, self._tokens.size)
            wait_s = self._tokens.wait_s(drawn, now)
            if wait_s > 0:
                raise RateLimited(
                    f"at most {self._tokens.size} tokens are allowed a minute, and this request may use "
                    f"{drawn}; try again in {_duration(wait_s)}",
                    retry_after_s=wait_s,
                    headers=self.headers(),
                )
            self._tokens.draw(drawn, now)
            if self._shared is not None and not self._counted:
                self._shared.settle(self._tenant, bucket=(self._tokens.size, drawn), budget=None)
        self._reserved += size.budget_tokens
        return Charge(self, size, drawn)

    def _check_budget(self, size: Size) -> None:
        limit, period = self._limits.token_budget, self._limits.budget_period
        if limit is None or size.budget_tokens <= self._left():
            return
        if size.budget_tokens > limit:
            raise _never_allowed(f"may use {size.budget_tokens} tokens", f"{limit} are allowed a {period}")
        used = self._budgets.used(self._tenant, period)
        if size.budget_tokens <= limit - used:
            raise RateLimited(
                f"of the budget of {limit} tokens a {period}, {used} are used and {self._reserved} reserved "
                f"for requests in progress, and this request may use {size.budget_tokens}; try again when "
                "they have ended",
                retry_after_s=1,
                headers=self.headers(),
            )
        raise BudgetSpent(
            f"of the budget of {limit} tokens a {period}, {used} are used"
            + (f" and {self._reserved} reserved for requests in progress" if self._reserved else "")
            + f", and this request may use {size.budget_tokens}",
            headers=self.headers(),
        )

    def _left(self) -> int:
        """Tokens of the budget that are neither used nor reserved."""
        limit = self._limits.token_budget
        assert limit is not None
        return limit - self._budgets.used(self._tenant, self._limits.budget_period) - self._reserved

    def settle(self, size: Size, drawn: int, used: int) -> None:
        """Replace the tokens drawn from the bucket and reserved in the budget by those actually used."""
        self._reserved -= size.budget_tokens
        if self._tokens is not None:
            self._tokens.draw(used - drawn, self._clock())
        period = self._limits.budget_period
        if self._limits.token_budget is not None:
            self._budgets.add(self._tenant, period, used)
        if self._shared is not None:
            self._shared.settle(
                self._tenant,
                bucket=None if self._tokens is None else (self._tokens.size, used - drawn),
                budget=None if self._limits.token_budget is None else (self._budgets.period(period), used),
            )

    def headers(self) -> dict[str, str]:
        """What is left, in OpenAI's rate-limit headers."""
        now, found = self._clock(), {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.size)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = _duration(bucket.wait_s(bucket.size, now))
        return found


class ConcurrencySlots:
    """The concurrency slots that one request occupies, one for each of its answers."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self.taken = 0

    async def resize(self, number: int) -> None:
        """Occupy ``number`` slots in all, once the request has been parsed. Raises as `Meter.request`."""
        if number > self.taken:
            await self._meter.sync_requests(number - self.taken)
            self.take(number)

    def take(self, number: int) -> None:
        """Occupy ``number`` slots in all. Refuses the request if they are not free."""
        self._meter.admit(number, number - self.taken)
        self.taken = number


class Charge:
    """The tokens reserved for one request. Settled once."""

    def __init__(self, meter: Meter, size: Size, drawn: int) -> None:
        self._meter = meter
        self._size = size
        self._drawn = drawn
        self._open = True

    def settle(self, used: int | None) -> None:
        """Charge the tokens used. None, when unknown, charges the estimate."""
        if self._open:
            self._open = False
            self._meter.settle(self._size, self._drawn, self._size.tokens if used is None else used)


class Limiter:
    """The meters of all tenants."""

    def __init__(
        self,
        budgets: Budgets,
        clock: Callable[[], float] = time.monotonic,
        shared: SharedCounts | None = None,
    ) -> None:
        self._budgets = budgets
        self._clock = clock
        self._shared = shared
        self._meters: dict[str, Meter] = {}

    def meter(self, tenant: Tenant) -> Meter:
        """The meter of a declared tenant."""
        if tenant.id not in self._meters:
            self._meters[tenant.id] = Meter(
                *(tenant.id, tenant.limits, self._budgets, self._clock, self._shared)
            )
        return self._meters[tenant.id]


def has_shared_limits(limits: Limits) -> bool:
    """Whether a tenant has limits that gateways can count together in Redis."""
    return any((limits.requests_per_minute, limits.tokens_per_minute, limits.token_budget))


def _never_allowed(asks: str, bound: str) -> InvalidRequest:
    return InvalidRequest(
        f"the request {asks}, but at most {bound}, so it can never succeed; split it into several requests "
        "with fewer prompts, a smaller n or a smaller max_tokens"
    )


def _bucket(per_minute: int | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now)


def _duration(seconds: float) -> str:
    """In OpenAI's format: 20ms, 7.5s, 1m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
