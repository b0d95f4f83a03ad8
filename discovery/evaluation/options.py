"""What the command line of `mechctl eval` says."""

from dataclasses import dataclass
from pathlib import Path

from discovery.errors import DiscoveryError
from discovery.evaluation.measures.contributions import MOST_PARTS
from discovery.evaluation.measures.latency import ROUNDS


@dataclass(frozen=True)
class JobOptions:
    """One evaluation."""

    policy: str
    """Id or file; empty: every active one."""
    suites: tuple[str, ...] = ()
    """Files, URLs or names of shipped suites; empty: those that the policy names."""
    url: str | None = None
    """A running gateway; None starts one for this run, with baselines."""
    out: Path | None = None
    """None: `runs/eval-<policy id>`."""
    data_folder: str | None = None
    max_tokens: int = 40
    concurrency: int = 32
    seed: int = 0
    limit: int | None = None
    """Most prompts of each role."""
    baseline_limit: int = 40
    """Most prompts of each role that served baselines are asked; 0 leaves them out."""
    answer_limit: int = 60
    """Most own answers whose likelihood is read."""
    contrast: Path | None = None
    """Prompts that the DiffMean direction is made of."""
    judge_url: str | None = None
    judge_model: str | None = None
    moderation_url: str | None = None
    moderation_model: str | None = None
    circuit: Path | None = None
    """The circuit file that the policy names; None: the one among the artifacts."""
    latency_rounds: int = ROUNDS
    """Rounds of timing; 0 measures no LCO."""
    parts: int = MOST_PARTS
    """Most parts of the policy that are ablated; 0 measures no CCS."""
    baselines: tuple[str, ...] = ()
    """``<kind>=<policy id>`` each."""
    prefix_cache: bool | None = None
    """Switch the prefix cache of this run's own engine on or off; None: vLLM's default."""
    publish: bool = False
    """Put the card into the folder of cards beside the policies."""

    def check(self) -> None:
        """Raise `DiscoveryError` for an option that cannot be, before anything is asked."""
        lowest = {"max_tokens": 1, "concurrency": 1, "limit": 1}
        lowest |= {"baseline_limit": 0, "answer_limit": 0, "latency_rounds": 0, "parts": 0}
        for name, least in lowest.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise DiscoveryError(f"--{name.replace('_', '-')} = {value}, but must be at least {least}")

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
