"""One evaluation: what is measured, how, and the answers."""

from dataclasses import dataclass
from pathlib import Path

from discovery.evaluation.answers.answer_file import AnswerFile, Unsteered
from discovery.evaluation.measures.latency import Rounds
from discovery.evaluation.options import JobOptions
from discovery.evaluation.subject import Subject
from discovery.evaluation.suites.suite import LoadedSuite
from discovery.judges.outcome import Outcomes
from interpretops.riskcard.card import BaselineKind


@dataclass(frozen=True)
class Measured:
    """The answers and the judges' verdicts."""

    answers: AnswerFile
    judged: dict[str, Outcomes]
    judges: dict[str, str]
    made: dict[BaselineKind, str]
    """How each baseline was made, or why it was not."""
    timed: Rounds | str = "not asked for: --latency-rounds 0"
    """Times with and without the policy, or why there are none."""
    unsteered: Unsteered | None = None
    """Answers without a policy."""


@dataclass(frozen=True)
class Run:
    """One evaluation, prepared."""

    loaded: LoadedSuite
    subject: Subject
    options: JobOptions
    out: Path
    dtype: str = "bfloat16"
    artifacts: Path = Path("sae_artifacts")
    """Folder of dictionaries, adapters and circuits."""
    circuits: Path | None = None
    """Folder of circuits by id."""
    engines: tuple[str, ...] = ()
    """`engine.url`: where the gateway's engines are, if it started none."""
    price_per_hour: float | None = None
    """`runtime.price_per_hour`."""
