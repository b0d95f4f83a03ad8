"""The Risk Card's fields: measures of a policy revision, their data and their uncertainty."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from interpretops.policy import SuccessCriteria
from interpretops.policy.fields import Identifier, StrictModel
from interpretops.riskcard.contribution import CircuitReference, Contribution
from interpretops.riskcard.latency import Latency
from interpretops.riskcard.measure import TOLERANCE, Interval, Measure, Pairs, Reason, Sha256, Source

__all__ = [
    "BASELINES",
    "MEASURES",
    "NATS",
    "Baseline",
    "BaselineKind",
    "CircuitReference",
    "Contribution",
    "Interval",
    "Latency",
    "Measure",
    "MeasureName",
    "Measures",
    "ModelReference",
    "Pairs",
    "PolicyReference",
    "Record",
    "RiskCard",
    "Source",
]

MeasureName = Literal[
    "defense_efficacy",
    "collateral_damage",
    "over_refusal",
    "coherent_share",
    "attack_success_rate",
    "refusal_rate",
    "toxicity_rate",
    "answers_unchanged",
    "similarity",
    "exact_match",
    "bleu",
    "exact_match_loss",
    "bleu_loss",
    "delta_ce",
    "delta_ce_answers",
    "factual_likelihood",
    "bias_likelihood",
    "causal_contribution",
    "circuit_stability",
    "latency_cost_overhead",
]
MEASURES: dict[MeasureName, tuple[str, str]] = {
    "defense_efficacy": ("DE", "attacks that succeed without the policy and are stopped with it"),
    "collateral_damage": ("CD", "benign prompts answered normally without the policy and not with it"),
    "over_refusal": ("OR", "the same on borderline prompts: harmless ones that sound harmful"),
    "coherent_share": ("coherent", "refusals of harmful prompts that are coherent text"),
    "attack_success_rate": ("ASR", "harmful prompts that are not refused in coherent text"),
    "refusal_rate": ("refused", "harmful prompts that are refused, coherently or not"),
    "toxicity_rate": ("toxic", "completions that are toxic"),
    "answers_unchanged": ("unchanged", "benign answers that are the same text as without the policy"),
    "similarity": ("similarity", "likeness of benign answers to those without the policy (chrF, 1: same)"),
    "exact_match": ("exact match", "tasks whose answer contains the reference answer"),
    "bleu": ("BLEU", "corpus BLEU of the answers of tasks against the references (1: same)"),
    "exact_match_loss": ("EM lost", "fall of the exact matches, as a share of those without the policy"),
    "bleu_loss": ("BLEU lost", "fall of the BLEU of tasks, as a share of that without the policy"),
    "delta_ce": ("ΔCE text", "rise of the cross-entropy on plain text, in nats per token"),
    "delta_ce_answers": ("ΔCE answers", "the same on the model's own unsteered answers to benign prompts"),
    "factual_likelihood": ("factual", "questions whose true option is likelier than every false one"),
    "bias_likelihood": ("bias", "pairs of which the stereotyped sentence is the likelier (0.5: no bias)"),
    "causal_contribution": (
        "CCS",
        "Causal Contribution Score: share of the policy's effect that is lost without one of its parts, "
        "the mean over its parts",
    ),
    "circuit_stability": (
        "CS",
        "Circuit Stability of the circuit that the policy came from: how alike repeated searches are",
    ),
    "latency_cost_overhead": (
        "LCO",
        "latency and cost overhead: time per generated token under the policy, relative to the same engine "
        "without it",
    ),
}
"""Short name and meaning of each measure; every card accounts for all of them."""
NATS: frozenset[MeasureName] = frozenset({"delta_ce", "delta_ce_answers"})
"""Measures that are not shares."""

BaselineKind = Literal["none", "system_prompt", "random_direction", "ungated", "diffmean", "block"]
BASELINES: dict[BaselineKind, str] = {
    "none": "no steering",
    "system_prompt": "a safety system prompt, no steering",
    "random_direction": "a random direction of the same norm",
    "ungated": "the same edit without its gate",
    "diffmean": "the difference of means as steering vector",
    "block": "the gate, then a fixed refusal text: a block, not steering",
}
"""Baselines that each policy is compared with; every card accounts for all of them."""

Measures = dict[MeasureName, Measure]


class Baseline(StrictModel):
    """The same measures for an alternative to the policy, on the same prompts."""

    measures: Measures = Field(default={})
    """Measures of the baseline; those that do not apply are omitted."""
    note: str = ""
    """How it was made."""
    absent: Reason | None = None
    """Why it was not measured."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if bool(self.measures) == (self.absent is not None):
            raise ValueError("needs either 'measures' or the reason why it is 'absent'")
        return self


class PolicyReference(StrictModel):
    """What was measured."""

    id: Identifier
    """Id of the policy."""
    revision: Sha256
    """sha256 of the compiled plan that the engine applied."""
    target_class: Identifier
    """The behaviour that it targets."""


class ModelReference(StrictModel):
    """The language model."""

    name: str
    """Its name."""
    fingerprint: Sha256
    """Fingerprint of its weights."""


class Record(StrictModel):
    """Everything needed to repeat the measurement."""

    command: str
    """The command line, without local folders."""
    suite: Identifier
    """Name of the evaluation suite."""
    suite_sha256: Sha256
    """Hash of the suite's file."""
    commit: str
    """Commit of the source tree; a trailing + means uncommitted changes."""
    versions: dict[str, str]
    """Versions of Python and of packages."""
    machine: str
    """Kind of machine."""
    measured_on: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """Day of the measurement, in UTC; older cards have none."""
    judges: dict[str, str] = Field(default={})
    """What judged the answers: the judge and its version or model."""
    settings: dict[str, str | int | float | bool] = Field(default={})
    """Sampling settings of the answers."""


class RiskCard(StrictModel):
    """The measured behaviour of one policy revision on one model."""

    format: Literal[2] = 2
    """Format version; older files can be read too (`interpretops.riskcard.older`)."""
    policy: PolicyReference
    """What was measured."""
    model: ModelReference
    """On which model."""
    criteria: SuccessCriteria
    """The criteria that the card is checked against."""
    measures: Measures
    """Every measure, or why it is absent."""
    baselines: dict[BaselineKind, Baseline]
    """Every baseline, or why it is absent."""
    circuit: CircuitReference
    """The circuit that the policy came from, or why there is none."""
    contributions: tuple[Contribution, ...] = ()
    """The share of the effect lost without each part of the policy; CCS is the mean."""
    latency: Latency | None = None
    """The times that LCO is computed from; None if it is absent."""
    record: Record
    """How to repeat it."""
    notes: tuple[str, ...] = ()
    """What the numbers do not show."""

    @model_validator(mode="after")
    def _accounts_for_all(self) -> Self:
        for name, given, known in (
            ("measures", set(self.measures), set(MEASURES)),
            ("baselines", set(self.baselines), set(BASELINES)),
        ):
            if missing := sorted(known - given):
                raise ValueError(f"{name} lacks {', '.join(missing)}; give each, or why it is 'absent'")
        return self

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        """CCS and LCO must match their own sections, and CS needs a named circuit."""
        ccs, lco = self.measures["causal_contribution"], self.measures["latency_cost_overhead"]
        if ccs.n != (len(self.contributions) or None):
            raise ValueError(f"contributions has {len(self.contributions)} parts, but CCS has n = {ccs.n}")
        mean = sum(part.share for part in self.contributions) / max(1, len(self.contributions))
        if ccs.value is not None and abs(ccs.value - mean) > TOLERANCE:
            raise ValueError(f"contributions have the mean {mean}, but CCS is {ccs.value}")
        if lco.n != (None if self.latency is None else self.latency.rounds):
            raise ValueError(
                "latency and the measure latency_cost_overhead must be given together, of the same rounds"
            )
        if self.measures["circuit_stability"].value is not None and self.circuit.absent is not None:
            raise ValueError("circuit is absent, but circuit_stability has a value")
        return self
