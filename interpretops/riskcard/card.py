"""The Risk Card's fields: what was measured of a policy revision, on what, and how sure it is."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from interpretops.policy import SuccessCriteria
from interpretops.policy.fields import Identifier, Strictly
from interpretops.riskcard.intervals import clopper_pearson

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0)]

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
    "delta_ce": ("ΔCE text", "rise of the cross-entropy on plain text, in nats per token"),
    "delta_ce_answers": ("ΔCE answers", "the same on the model's own unsteered answers to benign prompts"),
    "factual_likelihood": ("factual", "questions whose true option is likelier than every false one"),
    "bias_likelihood": ("bias", "pairs of which the stereotyped sentence is the likelier (0.5: no bias)"),
    "causal_contribution": ("CCS", "Causal Contribution Score of the circuit that the policy acts on"),
    "circuit_stability": ("CS", "Circuit Stability: how alike the circuits of repeated searches are"),
    "latency_cost_overhead": ("LCO", "time per token, relative to the engine without steering"),
}
"""Short name and meaning of each measure; every card accounts for all of them."""
NATS: frozenset[MeasureName] = frozenset({"delta_ce", "delta_ce_answers"})
"""Measures that are no shares."""

BaselineKind = Literal["none", "system_prompt", "random_direction", "ungated", "diffmean", "block"]
BASELINES: dict[BaselineKind, str] = {
    "none": "no steering",
    "system_prompt": "a safety system prompt, no steering",
    "random_direction": "a random direction of the same norm",
    "ungated": "the same edit without its gate",
    "diffmean": "the difference of means as steering vector",
    "block": "the gate, then a fixed refusal text: a block, not steering",
}
"""What each policy is compared with; every card accounts for all of them."""

Method = Literal["clopper_pearson", "paired_bootstrap", "bootstrap", "hoeffding", "notch", "given"]
_TOLERANCE = 1e-6


class Interval(Strictly):
    """A 95 % confidence interval."""

    low: Finite
    """Lower bound."""
    high: Finite
    """Upper bound."""
    method: Method
    """How it was computed; `given` when it was handed over with the value."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low = {self.low}, but that is above high = {self.high}")
        return self


class Pairs(Strictly):
    """How often an event occurred on the same prompts without (off) and with (on) the policy."""

    both: Count
    """Off and on."""
    only_off: Count
    """Off, and no more on."""
    only_on: Count
    """On, and not off."""
    neither: Count
    """Neither off nor on."""

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.both + self.only_off + self.only_on + self.neither


class Source(Strictly):
    """The part of a measure that comes from one file."""

    name: Identifier
    """The file's name in the suite."""
    sha256: Sha256
    """Hash of the file."""
    n: Count
    """Prompts, or pieces of text, that were taken from it."""
    successes: Count | None = None
    """As the measure's `successes`, for this file alone."""
    pairs: Pairs | None = None
    """As the measure's `pairs`, for this file alone."""


class Measure(Strictly):
    """One number with all that is needed to judge it, or the reason why it is not there."""

    value: Finite | None = None
    """The point estimate."""
    n: Annotated[int, Field(ge=1)] | None = None
    """What the value is a share or mean of."""
    successes: Count | None = None
    """Counted events, when the value is `successes / n`."""
    pairs: Pairs | None = None
    """The table that a comparison of answers without and with the policy comes from."""
    interval: Interval | None = None
    """The 95 % interval of `value`."""
    seeds: tuple[int, ...] = ()
    """Seeds of sampling and resampling."""
    data: tuple[Source, ...] = ()
    """Files that were measured on."""
    after_prompt: Literal[True] | None = None
    """Of a likelihood: read behind a prompt, where a gate has decided, and not in the prompt itself."""
    absent: Annotated[str, Field(min_length=1)] | None = None
    """Why there is no value."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        parts = (self.value, self.n, self.interval)
        if self.absent is not None:
            if any(part is not None for part in (*parts, self.successes, self.pairs)):
                raise ValueError("has both a value and a reason why it is absent")
            return self
        if self.value is None or self.n is None or self.interval is None:
            raise ValueError("needs value, n and interval, or the reason why it is 'absent'")
        if not self.interval.low - _TOLERANCE <= self.value <= self.interval.high + _TOLERANCE:
            raise ValueError(f"value = {self.value}, but that is outside of its interval")
        self._counts_fit()
        return self

    def _counts_fit(self) -> None:
        """What can be computed again must come out the same: a card is not edited by hand."""
        assert self.interval is not None
        exact = self.interval.method == "clopper_pearson"
        if self.pairs is not None and self.interval.method == "paired_bootstrap":
            off, on = self.pairs.both + self.pairs.only_off, self.pairs.both + self.pairs.only_on
            if off == 0 or self.n != self.pairs.n or abs(1 - on / off - (self.value or 0)) > _TOLERANCE:
                raise ValueError(f"value = {self.value} of n = {self.n}, but pairs give {on} after {off}")
        if self.successes is None or self.n is None:
            if exact:
                raise ValueError("interval.method = 'clopper_pearson', but there are no successes")
            return
        if self.successes > self.n:
            raise ValueError(f"successes = {self.successes}, but n = {self.n}")
        if exact:
            low, high = clopper_pearson(self.successes, self.n)
            found = (self.value, self.interval.low, self.interval.high)
            for given, right in zip(found, (self.successes / self.n, low, high), strict=True):
                if given is None or not math.isclose(given, right, abs_tol=_TOLERANCE):
                    raise ValueError(f"holds {given}, but {self.successes} of {self.n} give {right:.6f}")


Measures = dict[MeasureName, Measure]


class Baseline(Strictly):
    """The same measures for something else than the policy, on the same prompts."""

    measures: Measures = Field(default={})
    """Measures of the baseline; those it does not have are left out."""
    note: str = ""
    """How it was made."""
    absent: Annotated[str, Field(min_length=1)] | None = None
    """Why it was not measured."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if bool(self.measures) == (self.absent is not None):
            raise ValueError("needs either 'measures' or the reason why it is 'absent'")
        return self


class PolicyReference(Strictly):
    """What was measured."""

    id: Identifier
    """Id of the policy."""
    revision: Sha256
    """sha256 of the compiled plan that the engine applied."""
    target_class: Identifier
    """The behaviour it is aimed at."""


class ModelReference(Strictly):
    """The language model."""

    name: str
    """Its name."""
    fingerprint: Sha256
    """Fingerprint of its weights."""


class Record(Strictly):
    """What another needs to repeat the measurement."""

    command: str
    """The command line, without folders of one machine."""
    suite: Identifier
    """Name of the evaluation suite."""
    suite_sha256: Sha256
    """Hash of the suite's file."""
    commit: str
    """Commit of the source tree; a trailing + when files differed from it."""
    versions: dict[str, str]
    """Versions of Python and of packages."""
    machine: str
    """Kind of machine."""
    judges: dict[str, str] = Field(default={})
    """What decided about answers: judge and its version or model."""
    settings: dict[str, str | int | float | bool] = Field(default={})
    """Sampling settings of the answers."""


class RiskCard(Strictly):
    """The measured behaviour of one policy revision on one model."""

    format: Literal[1] = 1
    """Version of this layout."""
    policy: PolicyReference
    """What was measured."""
    model: ModelReference
    """On which model."""
    criteria: SuccessCriteria
    """The bar it is held against."""
    measures: Measures
    """Every measure, or why it is absent."""
    baselines: dict[BaselineKind, Baseline]
    """Every baseline, or why it is absent."""
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
