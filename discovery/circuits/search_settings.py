"""The settings of a search: how pairs are read and taken, what is measured, and how much of it."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from discovery.jobs.job_settings import STRICT

Layout = Literal["pairs", "ioi", "greater-than"]
Metric = Literal["logit_diff", "log_odds", "prob_diff"]


@dataclass(frozen=True, config=STRICT)
class PairFormat:
    """How a file's columns are read."""

    layout: Layout = "pairs"
    """Columns of the file."""
    corrupted_column: str = "corrupted"
    """Column of the corrupted prompts."""
    answers: tuple[str, ...] = ()
    """Favoured answer of all pairs, instead of the column `answer`."""
    wrong: tuple[str, ...] = ()
    """Disfavoured answer of all pairs, instead of the column `wrong`."""
    chat: bool | None = None
    """Put prompts into the model's chat format. None: prompts that show the behaviour, but not pairs."""
    skip_unfit: bool = False
    """Leave out pairs that do not fit each other, instead of refusing the file."""


@dataclass(frozen=True, config=STRICT)
class PairSelection:
    """Which pairs of a file are taken, and for what."""

    held_out: float = Field(default=0.5, gt=0, lt=1)
    """Share of the pairs that only measure."""
    limit: int | None = Field(default=None, ge=2)
    """Most pairs taken, those to search and those to measure together."""


@dataclass(frozen=True, config=STRICT)
class SearchSettings:
    """What a search measures and how much of it."""

    metric: Metric = "logit_diff"
    """What the circuit explains."""
    edges: int = Field(default=200, ge=1)
    """Most edges of the circuit."""
    steps: int = Field(default=5, ge=5)
    """Interpolation steps of EAP-IG."""
    seeds: int = Field(default=5, ge=5)
    """Seeds of the stability measure."""
    seed: int = 0
    """First seed of resamples and random circuits."""
    resamples: int = Field(default=4, ge=1)
    """Bootstrap resamples of each seed."""
    random_circuits: int = Field(default=20, ge=20)
    """Random circuits of the same sizes."""
    batch: int = Field(default=8, ge=1)
    """Pairs of a forward pass."""
    features: int = Field(default=32, ge=1)
    """Features of each dictionary whose contribution is measured exactly."""
