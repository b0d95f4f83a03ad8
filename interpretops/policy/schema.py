"""The policy: what a person writes. Every field is declared, documented and checked here once."""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PrivateAttr, Strict, ValidationError, model_validator

from interpretops.errors import PolicyError, refused_plainly
from interpretops.files.schema_faults import describe_faults
from interpretops.files.strict_yaml import Document, read_yaml
from interpretops.plan import MAX_ANSWER_WINDOW, MAX_WINDOW, Combine, Phase, Scope
from interpretops.policy.fields import (
    AdapterSelector,
    EditPoint,
    FeatureSelector,
    HeadSelector,
    Identifier,
    Index,
    NormBound,
    Number,
    PlaceSelector,
    RelativePath,
    StrictModel,
    Vector,
)
from interpretops.policy.terms import Constraints, Evaluation, Meta, SuccessCriteria

ALWAYS_GATE = "always"


class _Intervention(StrictModel):
    gate: Identifier = ALWAYS_GATE
    """When to act: `always`, or the name of an entry under `gates`."""


class FeatureScale(_Intervention):
    """Multiply the activation of features: 0 removes them, 1 leaves them, 2 doubles them."""

    type: Literal["feature_scale"]
    """Kind of the intervention."""
    selector: FeatureSelector
    """Which features."""
    scale: Number
    """Factor on the activation."""


class FeatureClamp(_Intervention):
    """Keep the activation of features inside a range."""

    type: Literal["feature_clamp"]
    """Kind of the intervention."""
    selector: FeatureSelector
    """Which features."""
    clamp_range: Annotated[tuple[Number, Number], Strict(False)]
    """Lowest and highest activation that may remain, in the dictionary's own units."""

    @model_validator(mode="after")
    def _ordered(self) -> "FeatureClamp":
        low, high = self.clamp_range
        if low > high:
            raise ValueError(f"clamp_range = [{low}, {high}] is inverted; write [{high}, {low}]")
        return self


class SteeringVector(_Intervention):
    """Add a fixed vector to the activation."""

    type: Literal["steering_vector"]
    """Kind of the intervention."""
    selector: PlaceSelector
    """Where."""
    vector: Vector
    """What to add. It is not normalised."""
    strength: Number
    """Factor on the vector; negative to subtract it."""
    max_norm: NormBound | None = None
    """Tokens with a larger norm (attention sinks) are not edited. Default: the bound of the dictionaries that
    the policy uses there, else the one in the model's `norm-bounds.yaml`, else none."""


class DirectionAblation(_Intervention):
    """Remove a direction from the activation."""

    type: Literal["direction_ablation"]
    """Kind of the intervention."""
    selector: PlaceSelector
    """Where."""
    vector: Vector
    """Which direction. It is normalised to length one."""
    strength: Number = 1.0
    """Share of the direction to remove: 1 removes all of it, 0 nothing."""
    max_norm: NormBound | None = None
    """Tokens with a larger norm (attention sinks) are not edited. Default: the bound of the dictionaries that
    the policy uses there, else the one in the model's `norm-bounds.yaml`, else none."""


class HeadScale(_Intervention):
    """Multiply the output of attention heads, before the output projection."""

    type: Literal["head_scale"]
    """Kind of the intervention."""
    selector: HeadSelector
    """Which heads."""
    scale: Number
    """Factor on the heads' output: 0 switches them off."""


class LoraGate(_Intervention):
    """Apply a low-rank adapter, at a given strength."""

    type: Literal["lora_gate"]
    """Kind of the intervention."""
    selector: AdapterSelector
    """Which part of the adapter."""
    alpha: Number
    """Factor on the adapter's output; 1 applies it as trained."""
    adapter: Identifier | None = None
    """Id of the adapter. Default: the one in the artifacts for `meta.target_class`."""


Intervention = Annotated[
    FeatureScale | FeatureClamp | SteeringVector | DirectionAblation | HeadScale | LoraGate,
    Field(discriminator="type"),
]


class Condition(StrictModel):
    """One reading of the activation where the gate reads: a feature, a probe direction, or an attention
    probe."""

    feature: Index | None = None
    """An SAE feature. The condition holds when its activation exceeds `threshold`."""
    dictionary: Identifier | None = None
    """Dictionary of `feature`; may be left out when the model has a single one at the gate's place."""
    probe: Vector | None = None
    """A direction. The condition holds when `probe . activation + bias` exceeds `threshold`."""
    attention_probe: RelativePath | None = None
    """A safetensors file, beside the policy or in the model's folder of the artifacts, with `<layer>.query`,
    `<layer>.read` (heads x width each), `<layer>.bias` (heads) and `<layer>.max_norm` (1), for the gate's
    layer and any before it. Each head takes the mean of `read . activation + bias` over the prompt, weighted
    by a softmax of `query . activation`; the sum over all must exceed `threshold`. For scope `prompt`, as its
    only condition."""
    bias: Number = 0.0
    """Added to the probe's reading."""
    threshold: Number = 0.0
    """The condition holds above this value."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Condition":
        if [self.feature, self.probe, self.attention_probe].count(None) != 2:
            raise ValueError("needs one of 'feature', 'probe' and 'attention_probe'")
        if self.feature is not None and self.bias != 0:
            raise ValueError("has a 'bias', which only a probe can have")
        if self.feature is None and self.dictionary is not None:
            raise ValueError("has a 'dictionary' but no 'feature' of it")
        if self.feature is not None and self.threshold < 0:
            raise ValueError(f"threshold = {self.threshold}, but a feature's activation is never negative")
        return self


REFUSAL_TEXT = "I'm sorry, but I can't help with that."
"""What clients get from a refusal gate that states no text of its own."""


class GateSpec(StrictModel):
    """When interventions act."""

    layer: Index | None = None
    """Layer at which the conditions read. It may not lie after the layers that the gate controls."""
    point: EditPoint = "resid_post"
    """Point of the layer at which the conditions read."""
    conditions: Annotated[tuple[Condition, ...], Field(max_length=64), Strict(False)] = ()
    """What must hold for the gate to open. Without conditions it is open throughout its phase."""
    combine: Combine = "any"
    """Whether `any` condition suffices or `all` must hold."""
    scope: Scope = "token"
    """What is read: every `token`, the last token of the prompt (`prompt_end`), the whole `prompt`, or the
    `answer` while it is generated. `prompt_end` and `prompt` decide at the prompt's last token, `answer` at
    each generated token, from the last `window` of them."""
    latched: bool = False
    """Once open, stay open until the end of the request."""
    phase: Phase = "both"
    """Where the gate acts: on the prompt (`prefill`), on the tokens that the answer is generated from
    (`decode`: the prompt's last token and the generated tokens), or on both."""
    max_norm: NormBound | None = None
    """Tokens with a larger norm (attention sinks) are not read. Default: the bound of the dictionaries that
    the policy uses there, else the one in the model's `norm-bounds.yaml`, else none. A gate of scope `prompt`
    or `prompt_end` that could not read too large a part of the prompt opens."""
    window: Annotated[int, Field(ge=1, le=MAX_WINDOW)] | None = None
    """For scope `prompt`: read every window of this many tokens by itself, and let the largest reading
    decide, so that a request does not drown in long text. Windows overlap by three quarters. Default: one
    reading of the whole prompt. Train the probe with the same window (`mechctl fit-gate --window`). For scope
    `answer`: how many of the latest generated tokens are read, at most 256; required."""
    beside: Identifier | None = None
    """For scope `answer`: a gate of scope `prompt` whose reading, times `prompt_weight`, is added."""
    prompt_weight: Number | None = None
    """Factor on the reading of the gate named by `beside`."""

    refusal: bool = False
    """An open gate means that the answer is a refusal. Where a grammar or a forced tool keeps the model from
    refusing in its own words, the engine then stops the answer at once, and clients get `refusal_text` the
    way their API tells refusals. Receipts, metrics and the audit log count these refusals."""
    refusal_text: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """The sentence that clients get instead of a constrained answer. Default: "I'm sorry, but I can't help
    with that." """

    @property
    def refusal_sentence(self) -> str | None:
        """The text for the plan; None if the gate does not mean a refusal."""
        return (self.refusal_text or REFUSAL_TEXT) if self.refusal else None

    @model_validator(mode="after")
    def _complete(self) -> "GateSpec":
        if self.refusal_text is not None and not self.refusal:
            raise ValueError("has a 'refusal_text', which only a gate with 'refusal: true' can have")
        if self.refusal_text is not None and not self.refusal_text.strip():
            raise ValueError("refusal_text is blank; leave it out for the default, or write a sentence")
        if self.refusal and not self.conditions:
            raise ValueError("has no conditions, so it is always open and cannot mean a refusal")
        if self.conditions and self.layer is None:
            raise ValueError("has conditions but no 'layer' at which they read")
        probes = [condition.attention_probe is not None for condition in self.conditions]
        probing = self.scope in ("prompt", "answer")
        if (probing or any(probes)) and (not probing or probes != [True]):
            raise ValueError(
                "scope 'prompt' goes with exactly one condition, an 'attention_probe', and so does 'answer'"
            )
        if probing and self.max_norm is not None:
            raise ValueError("has a 'max_norm', but an attention probe brings its own")
        if not probing and self.window is not None:
            raise ValueError(
                f"window = {self.window}, but scope '{self.scope}' reads single tokens; leave it out, or use "
                "scope 'prompt'"
            )
        self._check_answer()
        if not self.conditions and (self.layer is not None or self.latched or self.scope != "token"):
            raise ValueError("has no conditions, so 'layer', 'scope' and 'latched' mean nothing")
        return self

    def _check_answer(self) -> None:
        if self.scope != "answer":
            if self.beside is not None or self.prompt_weight is not None:
                raise ValueError("has 'beside' or 'prompt_weight', which only scope 'answer' can have")
            return
        if self.window is None or self.window > MAX_ANSWER_WINDOW:
            raise ValueError(
                f"window = {self.window}, but scope 'answer' needs 1 to {MAX_ANSWER_WINDOW} tokens"
            )
        if not self.latched:
            raise ValueError(
                "latched = false, but a gate of scope 'answer' stays open; write 'latched: true'"
            )
        if self.refusal:
            raise ValueError(
                "refusal = true, but scope 'answer' opens when part of the answer is already sent"
            )
        if self.phase == "prefill":
            raise ValueError("phase = 'prefill', but a gate of scope 'answer' opens after the prompt")
        if (self.beside is None) != (self.prompt_weight is None):
            raise ValueError("needs both of 'beside' and 'prompt_weight', or neither")


class Policy(StrictModel):
    """Edits of a model's activations, and when they act."""

    meta: Meta
    """Name and purpose of the policy."""
    constraints: Constraints = Constraints()
    """What it may cost."""
    gates: dict[Identifier, GateSpec] = Field(default={}, max_length=7)
    """Named conditions, for the `gate` of interventions."""
    interventions: Annotated[tuple[Intervention, ...], Field(min_length=1, max_length=256), Strict(False)]
    """The edits. All edits at one place read the same activation, and their changes add up."""
    evaluation: Evaluation = Evaluation()
    """How it is measured."""

    _document: Document = PrivateAttr(default_factory=lambda: Document("<policy>", {}))
    _folder: Path | None = PrivateAttr(default=None)

    RESERVED_IDS: ClassVar[frozenset[str]] = frozenset({"none"})

    @model_validator(mode="after")
    def _names_fit(self) -> "Policy":
        lines = []
        if self.meta.id in self.RESERVED_IDS:
            lines.append(f"meta.id = {self.meta.id!r}, but that word means 'no policy'; choose another")
        if ALWAYS_GATE in self.gates:
            lines.append(f"gates.{ALWAYS_GATE} is built in; choose another name")
        known = (ALWAYS_GATE, *self.gates)
        for index, intervention in enumerate(self.interventions):
            if intervention.gate not in known:
                name = f"interventions[{index}].gate = {intervention.gate!r}"
                lines.append(f"{name}, but the gates are {', '.join(known)}")
        for name in self.gates:
            if all(intervention.gate != name for intervention in self.interventions) and all(
                gate.beside != name for gate in self.gates.values()
            ):
                lines.append(f"gates.{name} is used by no intervention; remove it, or name it in a 'gate'")
        prompts = [name for name, gate in self.gates.items() if gate.scope == "prompt"]
        for name, gate in self.gates.items():
            if gate.beside is not None and gate.beside not in prompts:
                there = ", ".join(prompts) or "none"
                lines.append(
                    f"gates.{name}.beside = {gate.beside!r}, but the gates of scope 'prompt' are: {there}"
                )
        if lines:
            raise ValueError("\n".join(lines))
        return self

    @property
    def criteria(self) -> SuccessCriteria:
        """What its Risk Card must show: `success_criteria` and `constraints.max_benign_loss_pct`."""
        stated, promised = self.evaluation.success_criteria, self.constraints.max_benign_loss_pct
        if promised is None:
            return stated
        bars = [bar for bar in (stated.benign_loss_max, promised / 100) if bar is not None]
        return stated.model_copy(update={"benign_loss_max": min(1.0, *bars)})

    @property
    def document(self) -> Document:
        """The file it came from, for error messages."""
        return self._document

    @property
    def folder(self) -> Path | None:
        """Where the policy's own vector files lie; None when it came from no file."""
        return self._folder


@refused_plainly
def load_policy(path: Path | str) -> Policy:
    """Read a policy file; raises `PolicyError` with one line for every fault that shows without a model."""
    path = Path(path)
    return policy_from_document(read_yaml(path, PolicyError), path.parent)


def policy_from_document(document: Document, folder: Path | None) -> Policy:
    """The policy in a parsed document; ``folder`` is where its vector files lie."""
    try:
        policy = Policy.model_validate(document.data)
    except ValidationError as error:
        raise PolicyError(*describe_faults(error, document, Policy)) from error
    policy._document, policy._folder = document, folder
    return policy


def policy_schema() -> dict[str, Any]:
    """JSON Schema of the policy file, for editors."""
    schema = Policy.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
