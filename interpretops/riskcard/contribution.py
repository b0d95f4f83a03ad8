"""The contribution of each part of a policy, and the circuit that the policy came from."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from interpretops.ids import id_pattern
from interpretops.policy.fields import StrictModel
from interpretops.riskcard.measure import TOLERANCE, Finite, Interval, Reason, Sha256


class Contribution(StrictModel):
    """The Causal Contribution Score of one part of a policy: a row, a head, a feature, a vector."""

    part: Annotated[str, Field(min_length=1)]
    """What was removed, in words: `15.resid_post, feature 205 of resid-15-4k`."""
    share: Finite
    """Share of the policy's effect lost without it. 1 means all; negative means it worked against it."""
    interval: Interval
    """The 95 % interval of `share`, over prompts."""

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if not self.interval.low - TOLERANCE <= self.share <= self.interval.high + TOLERANCE:
            raise ValueError(f"share = {self.share}, but that is outside of its interval")
        return self


class CircuitReference(StrictModel):
    """The circuit file that a policy was proposed from."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """The file's name."""
    sha256: Sha256 | None = None
    """Hash of the file."""
    id: Annotated[str, Field(pattern=id_pattern("cx"))] | None = None
    """Its id, if it has one."""
    absent: Reason | None = None
    """Why there is none."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        named = self.name is not None and self.sha256 is not None
        if named == (self.absent is not None) or (self.name is None) != (self.sha256 is None):
            raise ValueError("needs name and sha256, or the reason why it is 'absent'")
        return self
