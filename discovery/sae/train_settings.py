"""The settings of a dictionary's training."""

from dataclasses import replace
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from discovery.jobs.job_settings import STRICT, out_of_range

MOST_TOKENS = 750_000
"""Tokens that a dictionary is trained on when the settings do not say."""
MOST_PASSES = 12
"""Passes over a small trace after which more would only make a dictionary know it by heart."""


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """What decides a dictionary, apart from its trace."""

    layer: int | None = None
    """Layer of the dictionary. None: the traced one that is nearest the middle of the model."""
    width: int = Field(default=4096, ge=2)
    """Number of features."""
    k: float = Field(default=32.0, gt=0)
    """Features active per token on average while training."""
    tokens: int | None = None
    """Tokens to train on; more than the trace holds means several passes. None: `MOST_TOKENS`, but no more
    than `MOST_PASSES` passes."""
    batch: int = Field(default=1024, ge=2)
    """Tokens of a step."""
    learning_rate: float = Field(default=4e-4, gt=0, lt=1)
    """Highest learning rate."""
    seed: int = 0
    """Seed of weights and order."""
    workers: int = Field(default=1, ge=1)
    """Processes on this host that share each step. Features are picked within the part of a batch that each
    has."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.k >= self.width:
            raise out_of_range("k", self.k, f"less than `width`, which is {self.width}")
        if self.batch < 2 * self.workers or self.batch % self.workers:
            right = f"a multiple of `workers`, which is {self.workers}, and at least twice as many"
            raise out_of_range("batch", self.batch, right)
        if self.tokens is not None and self.tokens < self.batch:
            raise out_of_range("tokens", self.tokens, f"at least `batch`, which is {self.batch}")
        return self

    def filled(self, trace: dict[str, Any]) -> "TrainSettings":
        """These settings with layer and tokens decided, where they are not, by the record of a trace."""
        layer, tokens = self.layer, self.tokens
        if layer is None:
            middle = int(trace["model"]["num_layers"]) // 2
            layer = min(trace["settings"]["layers"], key=lambda traced: abs(traced - middle))
        if tokens is None:
            stored = sum(int(entry["stored"]) for entry in trace["shards"])
            tokens = max(min(MOST_TOKENS, MOST_PASSES * stored), self.batch)
        return replace(self, layer=layer, tokens=tokens)
