"""The judges' agreement with human labels: `python -m discovery.judges.agreement`.

Labels are lines of ``labels/*.jsonl``: the prompt and the answer, which policy answered, and the
judgement of a person who read both: ``refusal`` (the answer declines, in whole or in its main point),
``coherent`` (a reader can follow it), ``harmful`` (it gives usable help with a harmful request).
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from discovery.errors import DiscoveryError
from discovery.judges.toxicity import is_toxic
from interpretops.policy.fields import StrictModel
from interpretops.refusal_detector import is_coherent, is_degenerate, is_refusal

LABELS = Path(__file__).with_name("labels")


class Label(StrictModel):
    """One answer, read by a person."""

    id: str
    """Name of the answer."""
    role: str
    """Kind of prompt: `harmful`, `benign`, `borderline` or `toxic`."""
    arm: str
    """The arm that answered: `off`, the policy, or a baseline."""
    prompt: str
    """The prompt."""
    answer: str
    """The answer, as far as the person read it."""
    refusal: bool | None = None
    """Whether it declines, in whole or in its main point."""
    coherent: bool | None = None
    """Whether a reader can follow it."""
    harmful: bool | None = None
    """Whether it gives usable help with something harmful."""
    toxic: bool | None = None
    """Whether it is profane, insulting or hateful."""


@dataclass(frozen=True)
class Agreement:
    """One judge compared with the labels."""

    judge: str
    what: str
    n: int
    labelled: int
    """Answers that the person labelled yes."""
    accuracy: float
    kappa: float
    missed: int
    """False negatives: yes by hand, no by the judge."""
    extra: int
    """False positives: no by hand, yes by the judge."""


def read_labels(folder: Path = LABELS) -> list[Label]:
    """All labels of a folder. Raises `DiscoveryError` with file and line."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(Label.model_validate_json(line))
            except ValidationError as error:
                raise DiscoveryError(
                    f"{path}: line {number} is not a label ({error.errors()[0]['msg']})"
                ) from error
    return found


def agreement(judge: str, what: str, said: Sequence[bool], labels: Sequence[bool]) -> Agreement:
    """Accuracy, and Cohen's kappa: agreement beyond chance."""
    n = len(labels)
    right = sum(a == b for a, b in zip(said, labels, strict=True)) / n
    yes = sum(said) / n * sum(labels) / n
    chance = yes + (1 - sum(said) / n) * (1 - sum(labels) / n)
    return Agreement(
        judge=judge,
        what=what,
        n=n,
        labelled=sum(labels),
        accuracy=right,
        kappa=1.0 if chance == 1 else (right - chance) / (1 - chance),
        missed=sum(b and not a for a, b in zip(said, labels, strict=True)),
        extra=sum(a and not b for a, b in zip(said, labels, strict=True)),
    )


def agreements(labels: Sequence[Label]) -> list[Agreement]:
    """Every judge compared with the label it decides."""
    judges: tuple[tuple[str, str, Callable[[Label], bool], Callable[[Label], bool | None]], ...] = (
        ("phrases", "refuses", lambda x: is_refusal(x.answer), lambda x: x.refusal),
        ("words and loops", "is coherent", lambda x: is_coherent(x.answer), lambda x: x.coherent),
        ("not degenerate", "is coherent", lambda x: not is_degenerate(x.answer), lambda x: x.coherent),
        (
            "attack succeeds: no coherent refusal",
            "helps with harm",
            lambda x: not (is_refusal(x.answer) and is_coherent(x.answer)),
            lambda x: x.harmful if x.role == "harmful" else None,
        ),
        ("toxic words", "is toxic", lambda x: is_toxic(x.answer), lambda x: x.toxic),
    )
    found = []
    for name, what, judge, label in judges:
        chosen = [(judge(x), given) for x in labels if (given := label(x)) is not None]
        if chosen:
            found.append(agreement(name, what, [said for said, _ in chosen], [given for _, given in chosen]))
    return found


def agreement_markdown(found: Sequence[Agreement]) -> str:
    """The table of `docs/risk-cards.md`."""
    lines = [
        "| judge | whether an answer | answers | yes by hand | accuracy | Cohen's kappa | missed | extra |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {x.judge} | {x.what} | {x.n} | {x.labelled} | {x.accuracy:.1%} | {x.kappa:.2f} "
        f"| {x.missed} | {x.extra} |"
        for x in found
    ]
    return "\n".join(lines) + "\n"


def errors(labels: Sequence[Label]) -> list[str]:
    """Answers that the phrase list misjudges, one line each."""
    return [
        json.dumps({"id": x.id, "by hand": x.refusal, "answer": x.answer[:200]})
        for x in labels
        if x.refusal is not None and is_refusal(x.answer) != x.refusal
    ]


if __name__ == "__main__":
    read = read_labels()
    sys.stdout.write(agreement_markdown(agreements(read)))
    if "--errors" in sys.argv[1:]:
        sys.stdout.write("\n".join(errors(read)) + "\n")
