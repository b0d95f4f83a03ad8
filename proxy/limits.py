"""What each tenant may use: requests and tokens a minute, requests at a time, tokens in a period.

Each gateway decides by its own buckets. Where several share Redis, they are filled from there first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from interpretops.settings import Limits, Tenant
from proxy.budget import Budgets
from proxy.refusal import BudgetSpent, RateLimited
from proxy.shared_limits import SharedCounts

_UNSTATED_TOKENS: Final = 256
"""What a request is taken to write when it does not say: a guess, put right when it ends."""
_BYTES_PER_TOKEN: Final = 4


class Bucket:
    """Fills evenly over a minute; may be drawn below nothing, and then has to fill up first."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.size = per_minute
        self._level = float(per_minute)
        self._stamp = now

    def level(self, now: float) -> float:
        """What is in it."""
        self._level = min(self.size, self._level + max(0.0, now - self._stamp) * self.size / 60)
        self._stamp = now
        return self._level

    def correct(self, level: float, now: float) -> None:
        """What all gateways together have left in it."""
        self._level, self._stamp = level, now

    def draw(self, amount: float, now: float) -> None:
        """Take out; a negative amount gives back."""
        self._level = min(self.size, self.level(now) - amount)

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` is in it."""
        return max(0.0, (amount - self.level(now)) * 60 / self.size)


class Meter:
    """Counts one tenant's use."""

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
        """Whether Redis counted what is about to be reserved."""
        self._tenant = tenant
        self._limits = limits
        self._budgets = budgets
        self._clock = clock
        self._requests = _bucket(limits.requests_per_minute, now)
        self._tokens = _bucket(limits.tokens_per_minute, now)
        self.in_flight = 0

    async def hear_requests(self) -> None:
        """Take a request's share from what all gateways have left, so that `request` decides by that."""
        limits = self._limits
        if self._shared is None or self._requests is None:
            return
        if limits.concurrency is None or self.in_flight < limits.concurrency:
            await self._hear(self._shared, "requests", self._requests, 1)

    async def hear_tokens(self, body: Mapping[str, Any], size: int) -> None:
        """As `hear_requests`, for `reserve`."""
        shared, limit, period = self._shared, self._limits.token_budget, self._limits.budget_period
        if shared is None:
            return
        if limit is not None:
            used = await shared.used(self._tenant, self._budgets.period(period))
            if used is not None:
                self._budgets.correct(self._tenant, period, used)
            if self._budgets.used(self._tenant, period) >= limit:
                return
        if self._tokens is not None:
            amount = min(estimate_tokens(body, size), self._tokens.size)
            await self._hear(shared, "tokens", self._tokens, amount)

    async def _hear(self, shared: SharedCounts, kind: str, bucket: Bucket, amount: int) -> None:
        level = await shared.draw(self._tenant, kind, bucket.size, amount)
        self._counted = level is not None
        if level is not None:
            bucket.correct(level, self._clock())

    @contextmanager
    def request(self) -> Iterator[None]:
        """One request, however it ends; refuses it when there are too many."""
        limits, now = self._limits, self._clock()
        if limits.concurrency is not None and self.in_flight >= limits.concurrency:
            raise RateLimited(
                f"{self.in_flight} requests are in progress, and at most {limits.concurrency} are served "
                "at a time; wait for one to end",
                retry_after_s=1.0,
                headers=self.headers(),
            )
        if self._requests is not None:
            wait_s = self._requests.wait_s(1, now)
            if wait_s > 0:
                raise RateLimited(
                    f"at most {self._requests.size} requests are served a minute; try again in "
                    f"{_duration(wait_s)}",
                    retry_after_s=wait_s,
                    headers=self.headers(),
                )
            self._requests.draw(1, now)
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def reserve(self, body: Mapping[str, Any], size: int) -> Charge:
        """Set aside what a request may use, by its text and what it says; refuses what is over a limit."""
        estimate = estimate_tokens(body, size)
        limit = self._limits.token_budget
        if limit is not None and self._budgets.used(self._tenant, self._limits.budget_period) >= limit:
            raise BudgetSpent(
                f"the budget of {limit} tokens a {self._limits.budget_period} is spent",
                headers=self.headers(),
            )
        if self._tokens is not None:
            now = self._clock()
            # What is larger than the bucket is admitted when that is full: it pays by what it waits after.
            estimate = min(estimate, self._tokens.size)
            wait_s = self._tokens.wait_s(estimate, now)
            if wait_s > 0:
                raise RateLimited(
                    f"at most {self._tokens.size} tokens are served a minute, and this request may use "
                    f"{estimate}; try again in {_duration(wait_s)}",
                    retry_after_s=wait_s,
                    headers=self.headers(),
                )
            self._tokens.draw(estimate, now)
            if self._shared is not None and not self._counted:
                self._shared.settle(self._tenant, bucket=(self._tokens.size, estimate), budget=None)
        return Charge(self, estimate)

    def settle(self, estimate: int, used: int) -> None:
        """Charge what was used in place of what was set aside."""
        if self._tokens is not None:
            self._tokens.draw(used - estimate, self._clock())
        period = self._limits.budget_period
        if self._limits.token_budget is not None:
            self._budgets.add(self._tenant, period, used)
        if self._shared is not None:
            self._shared.settle(
                self._tenant,
                bucket=None if self._tokens is None else (self._tokens.size, used - estimate),
                budget=None if self._limits.token_budget is None else (self._budgets.period(period), used),
            )

    def headers(self) -> dict[str, str]:
        """What is left, as OpenAI's clients read it."""
        now, found = self._clock(), {}
        for name, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = str(bucket.size)
                found[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.level(now))))
                found[f"x-ratelimit-reset-{name}"] = _duration(bucket.wait_s(bucket.size, now))
        return found


class Charge:
    """What one request has set aside; settled once."""

    def __init__(self, meter: Meter, estimate: int) -> None:
        self._meter = meter
        self._estimate = estimate
        self._open = True

    def settle(self, used: int | None) -> None:
        """Charge what was used; None, when nobody knows, charges what was set aside."""
        if self._open:
            self._open = False
            self._meter.settle(self._estimate, self._estimate if used is None else used)


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


def counted_together(limits: Limits) -> bool:
    """Whether a tenant has limits that gateways count together, where they share any."""
    return any((limits.requests_per_minute, limits.tokens_per_minute, limits.token_budget))


def estimate_tokens(body: Mapping[str, Any], size: int) -> int:
    """What a request may use: its text at four bytes a token, and all that it allows to be written."""
    stated = [body.get(name) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
    given = [value for value in stated if isinstance(value, int) and value > 0]
    choices = body.get("n")
    number = choices if isinstance(choices, int) and choices > 0 else 1
    return size // _BYTES_PER_TOKEN + number * (max(given) if given else _UNSTATED_TOKENS)


def _bucket(per_minute: int | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now)


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 7.5s, 1m0s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{int(minutes)}m{rest:g}s" if minutes else f"{rest:g}s"
