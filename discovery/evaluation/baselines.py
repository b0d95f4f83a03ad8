"""The baselines of a Risk Card: what the policy must beat, on the same prompts."""

from collections.abc import Mapping
from typing import get_args

from discovery.evaluation.answers import AnswerFile
from discovery.evaluation.metrics import Outcomes, answer_measures, blocked, text_measure
from discovery.evaluation.suite import LoadedSuite
from interpretops.policy import ALWAYS_GATE, Policy
from interpretops.riskcard.card import BASELINES, Baseline, BaselineKind

SERVED_BASELINES = ("random_direction", "ungated", "diffmean")
"""Baselines that are policies themselves, measured where the gateway serves one."""


def card_baselines(
    loaded: LoadedSuite,
    policy: Policy,
    answers: AnswerFile,
    judged: Mapping[str, Outcomes],
    seed: int,
) -> dict[BaselineKind, Baseline]:
    """Each baseline, measured from what the arms answered, or why it is absent."""
    off = judged["off"]
    found: dict[BaselineKind, Baseline] = {
        "none": Baseline(
            measures=answer_measures(loaded, off, off, seed), note="DE and CD are 0 by definition"
        )
    }
    for kind in get_args(BaselineKind):
        if kind in judged:
            measures = answer_measures(loaded, off, judged[kind], seed)
            if kind in SERVED_BASELINES:
                measures["delta_ce"] = text_measure(loaded, answers.answers, kind, seed)
            note = loaded.suite.system_prompt if kind == "system_prompt" else _served(answers, kind)
            found[kind] = Baseline(measures=measures, note=note or "")
    gates = policy.gates
    gated = all(edit.gate != ALWAYS_GATE and gates[edit.gate].conditions for edit in policy.interventions)
    fired = {key: answers.answers["on", key].fired for key in off}
    if gated and all(count is not None for count in fired.values()):
        block = blocked(off, {key: bool(count) for key, count in fired.items()})
        found["block"] = Baseline(
            measures=answer_measures(loaded, off, block, seed),
            note="computed from the receipts' gate firings; coherent by construction",
        )
    reasons = {
        "system_prompt": "the suite leaves it out",
        "block": "the policy acts without a condition, or the receipts do not tell its firings",
    }
    for kind in BASELINES:
        reason = reasons.get(kind, f"not served; give --baseline {kind}=POLICY")
        found.setdefault(kind, Baseline(absent=reason))
    return found


def _served(answers: AnswerFile, kind: str) -> str:
    answer = next(answer for (arm, _), answer in answers.answers.items() if arm == kind)
    return f"policy {answer.policy}@{answer.revision[:12]}"
