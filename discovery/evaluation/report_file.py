"""What `mechctl eval --report` writes: of each policy each suite's metrics, and the whole Risk Card."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from discovery.errors import DiscoveryError
from discovery.evaluation.answers.answer_file import Answer
from discovery.evaluation.measures.metrics import answer_measures, task_measure, text_measure
from discovery.evaluation.suites.suite import EvaluationSuite, LoadedSuite
from discovery.judges.outcome import Outcomes
from interpretops.files.atomic_file import write_atomically
from interpretops.riskcard import RiskCard, verdict
from interpretops.riskcard.card import Measure, MeasureName
from interpretops.riskcard.file import card_document

FORMAT = 1
ARMS = {"off": "without", "on": "with"}
"""The arms of a run, and what a report calls them."""


@dataclass(frozen=True)
class SuiteResult:
    """What one suite showed of a policy."""

    name: str
    prompts: int
    measures: Mapping[MeasureName, Mapping[str, Measure]]
    """By metric, ``without`` and ``with`` the policy."""

    def lines(self) -> list[str]:
        """A line for each metric."""
        return [
            f"{self.name}: {name} {_number(arms['without'])} without, {_number(arms['with'])} with "
            f"the policy ({self.prompts} prompts)"
            for name, arms in self.measures.items()
        ]


def suite_results(
    loaded: LoadedSuite,
    judged: Mapping[str, Outcomes],
    answers: Mapping[tuple[str, str], Answer],
    seed: int,
) -> list[SuiteResult]:
    """Each suite of a run by itself: the metrics it names, else all that its prompts can show."""
    return [_result(loaded, part, judged, answers, seed) for part in loaded.parts]


def _result(
    loaded: LoadedSuite,
    part: EvaluationSuite,
    judged: Mapping[str, Outcomes],
    answers: Mapping[tuple[str, str], Answer],
    seed: int,
) -> SuiteResult:
    own = replace(loaded, prompts=tuple(p for p in loaded.prompts if p.suite == part.name))
    found: dict[str, dict[MeasureName, Measure]] = {}
    for arm, called in ARMS.items():
        found[called] = dict(answer_measures(own, judged["off"], judged[arm], seed))
        found[called]["bleu"] = task_measure(own, answers, arm)
        found[called]["delta_ce"] = text_measure(own, answers, arm, seed)
    named = part.metrics or tuple(name for name, value in found["with"].items() if value.value is not None)
    measures = {name: {called: found[called][name] for called in ARMS.values()} for name in named}
    return SuiteResult(part.name, len(own.prompts), measures)


def write_report(path: Path, evaluated: Sequence[tuple[RiskCard, Sequence[SuiteResult]]]) -> None:
    """Write the report whole or not at all. Raises `DiscoveryError`."""
    policies = [
        {
            "id": card.policy.id,
            "revision": card.policy.revision,
            "verdict": verdict(card).status,
            "suites": {result.name: _suite(result) for result in results},
            "card": card_document(card),
        }
        for card, results in evaluated
    ]
    model = evaluated[0][0].model.model_dump(mode="json")
    text = json.dumps({"format": FORMAT, "model": model, "policies": policies}, indent=1, allow_nan=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (text + "\n").encode())
    except OSError as error:
        raise DiscoveryError(f"--report = {path}: cannot be written ({error.strerror or error})") from error


def _suite(result: SuiteResult) -> dict[str, Any]:
    return {
        "prompts": result.prompts,
        "metrics": {
            name: {called: _plain(measure) for called, measure in arms.items()}
            for name, arms in result.measures.items()
        },
    }


def _plain(measure: Measure) -> dict[str, Any]:
    if measure.value is None or measure.interval is None:
        return {"absent": measure.absent}
    return {"value": measure.value, "n": measure.n, "interval": [measure.interval.low, measure.interval.high]}


def _number(measure: Measure) -> str:
    if measure.value is None or measure.interval is None:
        return f"none ({measure.absent})"
    return f"{measure.value:.2f} [{measure.interval.low:.2f}, {measure.interval.high:.2f}]"
