"""One number of a Risk Card: value, interval, counts and data, or the reason why it is absent."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from interpretops.policy.fields import Identifier, StrictModel
from interpretops.riskcard.intervals import clopper_pearson

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]
Reason = Annotated[str, Field(min_length=1)]
Method = Literal["clopper_pearson", "paired_bootstrap", "bootstrap", "hoeffding", "notch", "given"]
TOLERANCE = 1e-6


class Interval(StrictModel):
    """A 95 % confidence interval."""

    low: Finite
    """Lower bound."""
    high: Finite
    """Upper bound."""
    method: Method
    """How it was computed; `given` if it came with the value."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low = {self.low}, but that is above high = {self.high}")
        return self


class Pairs(StrictModel):
    """How often an event occurred on the same prompts without (off) and with (on) the policy."""

    both: Count
    """Off and on."""
    only_off: Count
    """Off only."""
    only_on: Count
    """On only."""
    neither: Count
    """Neither off nor on."""

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.both + self.only_off + self.only_on + self.neither


class Source(StrictModel):
    """The part of a measure that comes from one file."""

    name: Identifier
    """The file's name in the suite."""
    sha256: Sha256
    """Hash of the file."""
    n: Count
    """Prompts or text passages taken from it."""
    successes: Count | None = None
    """The measure's `successes` for this file only."""
    pairs: Pairs | None = None
    """The measure's `pairs` for this file only."""


class Measure(StrictModel):
    """One number with everything needed to judge it, or the reason why it is absent."""

    value: Finite | None = None
    """The point estimate."""
    n: Annotated[int, Field(ge=1)] | None = None
    """What the value is a share or mean of."""
    successes: Count | None = None
    """Counted events, if the value is `successes / n`."""
    pairs: Pairs | None = None
    """The paired counts that compare answers without and with the policy."""
    interval: Interval | None = None
    """The 95 % interval of `value`."""
    seeds: tuple[int, ...] = ()
    """Seeds of sampling and resampling."""
    data: tuple[Source, ...] = ()
    """Files that the measure was taken on."""
    after_prompt: Literal[True] | None = None
    """For a likelihood: whether it was read after a prompt, where a gate has decided, not in the prompt."""
    absent: Reason | None = None
    """Why there is no value."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        parts = (self.value, self.n, self.interval)
        if self.absent is not None:
            if any(part is not None for part in (*parts, self.successes, self.pairs)):
                raise ValueError("has both a value and a reason why it is absent")
            return self
        if self.value is None or self.n is None or self.interval is None:
            raise ValueError("needs value, n and interval, or the reason why it is 'absent'")
        if not self.interval.low - TOLERANCE <= self.value <= self.interval.high + TOLERANCE:
            raise ValueError(f"value = {self.value}, but that is outside of its interval")
        self._counts_fit()
        return self

    def _counts_fit(self) -> None:
        """Recompute what can be recomputed, to catch cards edited by hand."""
        assert self.interval is not None
        exact = self.interval.method == "clopper_pearson"
        if self.pairs is not None and self.interval.method == "paired_bootstrap":
            off, on = self.pairs.both + self.pairs.only_off, self.pairs.both + self.pairs.only_on
            if off == 0 or self.n != self.pairs.n or abs(1 - on / off - (self.value or 0)) > TOLERANCE:
                raise ValueError(f"value = {self.value} of n = {self.n}, but pairs give {on} after {off}")
        if self.successes is None or self.n is None:
            if exact:
                raise ValueError("interval.method = 'clopper_pearson', but there are no successes")
            return
        if self.successes > self.n:
            raise ValueError(f"successes = {self.successes}, but n = {self.n}")
        if exact:
            low, high = clopper_pearson(self.successes, self.n)
            found = (self.value, self.interval.low, self.interval.high)
            for given, right in zip(found, (self.successes / self.n, low, high), strict=True):
                if given is None or not math.isclose(given, right, abs_tol=TOLERANCE):
                    raise ValueError(f"holds {given}, but {self.successes} of {self.n} give {right:.6f}")
