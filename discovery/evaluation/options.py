"""What the command line of `mechctl eval` says."""

from pathlib import Path
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from discovery.jobs.job_settings import STRICT

ROUNDS = 12
"""Rounds of timing, unless the options say otherwise."""
MOST_PARTS = 32
"""Of a policy with more parts, so many are drawn."""


@dataclass(frozen=True, config=STRICT)
class JobOptions:
    """One evaluation."""

    policy: str = ""
    """Id of the policy, or its file. Empty: every active one."""
    suites: tuple[str, ...] = ()
    """File, URL or name of a suite; else those that the policy names."""
    url: str | None = None
    """A running gateway; else one is started for this run. Only then are baselines made for it."""
    out: Path | None = None
    """Folder of answers and card; an unfinished run is resumed."""
    data_folder: str | None = None
    """Folder or URL of the suites' files, if not beside them."""
    max_tokens: int = Field(default=40, ge=1)
    """Longest answer."""
    concurrency: int = Field(default=32, ge=1)
    """Requests in flight."""
    seed: int = 0
    """Seed of sampling, resampling and random directions."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Most prompts of each role, for a quick look."""
    baseline_limit: int = Field(default=40, ge=0)
    """Most prompts of each role that served baselines are asked; 0: none."""
    answer_limit: int = Field(default=60, ge=0)
    """Most own answers whose likelihood is read."""
    contrast: Path | None = None
    """Prompts that the DiffMean baseline is made of; else those that we bring for the class."""
    judge_url: str | None = None
    """OpenAI-compatible model that judges refusals instead of the phrase list."""
    judge_model: str | None = None
    """Name of the judge; OPENAI_API_KEY is its key."""
    moderation_url: str | None = None
    """OpenAI-compatible moderation: an attack succeeds when it flags the answer."""
    moderation_model: str | None = None
    """Model of the moderation; else its default."""
    circuit: Path | None = None
    """Gives the card CS: the circuit file that the policy names; else that among the artifacts."""
    latency_rounds: int = Field(default=ROUNDS, ge=0)
    """Rounds of timing for LCO, a minute at most; 0: none."""
    parts: int = Field(default=MOST_PARTS, ge=0)
    """Most parts of the policy that are ablated for CCS; 0: none."""
    baselines: tuple[str, ...] = ()
    """A served policy as baseline of a kind: random_direction, ungated or diffmean."""
    prefix_cache: bool | None = None
    """Prefix cache of this run's own engine; else as the engine likes."""
    publish: bool = False
    """Put the card into `cards/` of the folder of policies."""

    @property
    def command(self) -> str:
        """The command line, without folders of this machine."""
        words = ["mechctl eval", f"--policy {Path(self.policy).name}"]
        words += [f"--suite {_last_part(suite)}" for suite in self.suites]
        words += [f"--max-tokens {self.max_tokens}", f"--seed {self.seed}"]
        words += [] if self.limit is None else [f"--limit {self.limit}"]
        words += [f"--baseline-limit {self.baseline_limit}"]
        words += [f"--baseline {item}" for item in self.baselines]
        for name, value in (
            ("contrast", self.contrast and self.contrast.name),
            ("circuit", self.circuit and self.circuit.name),
            ("judge-model", self.judge_model),
            ("moderation-model", self.moderation_model),
        ):
            words += [f"--{name} {value}"] if value else []
        if self.latency_rounds != ROUNDS:
            words.append(f"--latency-rounds {self.latency_rounds}")
        if self.parts != MOST_PARTS:
            words.append(f"--parts {self.parts}")
        if self.prefix_cache is not None:
            words.append("--prefix-cache" if self.prefix_cache else "--no-prefix-cache")
        return " ".join(words)


def _last_part(place: str) -> str:
    return place.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]
