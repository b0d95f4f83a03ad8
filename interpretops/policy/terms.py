"""What a policy says of itself, what it may cost, how it is measured, and what must come of that."""

from typing import Annotated, Literal

from pydantic import Field, Strict

from interpretops.ids import id_pattern
from interpretops.policy.fields import (
    Fraction,
    Identifier,
    Number,
    Percentage,
    StrictModel,
)


class Origin(StrictModel):
    """What a policy was proposed from; `mechctl propose --from circuit` writes it."""

    circuit: Annotated[str, Field(min_length=1, max_length=255)]
    """Name of the circuit file."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Hash of that file."""
    id: Annotated[str, Field(pattern=id_pattern("cx"))] | None = None
    """Id of the circuit, by which `mechctl circuits` knows it."""


class Meta(StrictModel):
    """Who the policy is."""

    id: Identifier
    """Its name in headers, bindings, metrics and receipts."""
    description: str = Field(default="", max_length=4096)
    """What it is for."""
    target_class: Identifier = "general"
    """The kind of behaviour it is aimed at; finds the adapter of a `lora_gate`."""
    origin: Origin | None = None
    """The circuit that it was proposed from, if it was: its Risk Card names it."""


class Constraints(StrictModel):
    """What the policy may cost."""

    max_latency_overhead_pct: Percentage | None = None
    """Highest acceptable slow-down, in per cent; else `runtime.max_latency_overhead_pct` of the settings."""
    on_latency_overhead: Literal["alert", "refuse"] = "alert"
    """What happens while the gateway's canary finds it slower: an alert, or its requests are refused as well.
    None is ever served without it."""
    max_benign_loss_pct: Percentage | None = None
    """Most that may be lost on benign requests, in per cent of the unsteered run. The Risk Card is held to it
    as to `success_criteria.benign_loss_max`, a share; where both are given, the lower holds."""


class Suite(StrictModel):
    """A set of prompts on which the policy is measured."""

    name: Identifier
    """Its name."""
    path: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Its file, beside the policy or from the working directory, or a URL that fsspec reads; else the suite
    of that name that `mechctl eval` brings."""


class SuccessCriteria(StrictModel):
    """What the measurements must show before the policy becomes active: the bound of the 95 % interval, not
    the point, must meet each."""

    defense_efficacy_min: Fraction | None = None
    """Least share of attacks that must be stopped."""
    collateral_damage_max: Fraction | None = None
    """Largest share of benign requests that may be harmed."""
    benign_loss_max: Fraction | None = None
    """Largest loss on benign requests against the unsteered run, as a share. Three must meet it: answers
    harmed (CD), exact matches lost and BLEU lost; the last two need a suite with a source of role `task`."""
    over_refusal_max: Fraction | None = None
    """Largest share of borderline requests (harmless, sound harmful) that may be harmed."""
    source_collateral_damage_max: Fraction | None = None
    """The same as `collateral_damage_max` for every benign source by itself that has at least 100 prompts: a
    mean over all hides a source that is refused most of the time."""
    source_over_refusal_max: Fraction | None = None
    """The same as `over_refusal_max` for every borderline source of at least 100 prompts."""
    coherent_share_min: Fraction | None = None
    """Least share of refusals that must be coherent text."""
    attack_success_rate_max: Fraction | None = None
    """Largest share of attacks that may succeed."""
    toxicity_rate_max: Fraction | None = None
    """Largest share of toxic completions."""
    delta_ce_max: Number | None = None
    """Largest rise of the cross-entropy on plain text, in nats per token."""
    delta_ce_answers_max: Number | None = None
    """Largest rise of the cross-entropy on the model's own benign answers, in nats per token."""
    causal_contribution_min: Fraction | None = None
    """Least Causal Contribution Score: the mean share of the policy's effect that is lost without one of its
    parts."""
    circuit_stability_min: Fraction | None = None
    """Least Circuit Stability of the circuit that the policy came from."""
    latency_overhead_max: Number | None = None
    """Largest slow-down, as a share: 0.2 is 20 %."""


class Evaluation(StrictModel):
    """How the policy is measured."""

    suites: Annotated[tuple[Suite, ...], Strict(False)] = ()
    """The suites to run; the card of the first is the policy's card."""
    success_criteria: SuccessCriteria = SuccessCriteria()
    """The bar."""
