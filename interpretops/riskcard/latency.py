"""The times behind LCO: alternating batches of requests on one engine, with and without the policy."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from interpretops.policy.fields import StrictModel
from interpretops.riskcard.measure import Finite

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
SECONDS_PER_HOUR = 3600


class Timing(StrictModel):
    """How long one batch takes."""

    median_s: Seconds
    """Median over the rounds, in seconds."""
    lower_s: Seconds
    """Lower quartile."""
    upper_s: Seconds
    """Upper quartile."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.lower_s <= self.median_s <= self.upper_s:
            raise ValueError(f"median_s = {self.median_s}, but that is outside of its quartiles")
        return self


class Latency(StrictModel):
    """One batch of requests, run repeatedly without (off) and with (on) the policy."""

    requests: Annotated[int, Field(ge=1)]
    """Requests in a batch, all sent at once."""
    tokens: Annotated[int, Field(ge=1)]
    """Exact number of tokens generated for each request, with and without the policy."""
    rounds: Annotated[int, Field(ge=2)]
    """Rounds; each is one batch without and one with the policy, in alternating order."""
    off: Timing
    """Without the policy."""
    on: Timing
    """With it."""
    machine: str
    """Processor, cores and GPUs."""
    price_per_hour: Annotated[Finite, Field(ge=0)] | None = None
    """`runtime.price_per_hour` at the time of measurement: the price of this machine, in dollars."""

    def seconds_per_token(self, timing: Timing) -> float:
        """Median machine time per generated token."""
        return timing.median_s / (self.requests * self.tokens)

    def cost_per_1000_requests(self, timing: Timing) -> float | None:
        """Dollars per 1,000 such requests on a machine that is always busy."""
        if self.price_per_hour is None:
            return None
        return 1000 * timing.median_s / self.requests * self.price_per_hour / SECONDS_PER_HOUR
