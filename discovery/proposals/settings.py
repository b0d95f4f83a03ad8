"""What decides a proposal, apart from model and data."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from discovery.jobs.job_settings import STRICT, out_of_range

Start = Literal["contrast", "features", "circuit"]
MethodName = Literal["direction", "sae-feature", "gated-edit", "word-rows"]
GateName = Literal["probe", "features"]
Share = Annotated[float, Field(ge=0, le=1)]
ANEW = "remove the folder or give another --work"
"""What to do about a work folder of another proposal."""


@dataclass(frozen=True, config=STRICT)
class Budgets:
    """The most that a policy may cost what it is not for, on the selection prompts."""

    benign: Share = 0.02
    """Share of benign selection prompts that may newly fail."""
    borderline: Share = 0.12
    """Share of borderline selection prompts that may newly fail."""
    text: float = 0.02
    """For classes to avoid: most that the cross-entropy of benign text may rise, in nats per token."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProposeSettings:
    """Options of `mechctl propose`."""

    start: Start = "contrast"
    """What decides where to act."""
    method: MethodName = "direction"
    """Kind of edit."""
    contrast: Path
    """Class file (YAML), pairs of `mechctl search`, or a data list of `fit-gate`."""
    policy_id: str | None = None
    """Id of the policy."""
    data_folder: Path | None = None
    """Where the contrast's files lie, if not beside it."""
    features: str | None = None
    """For a start from features: ids as 12,40, or a file of them."""
    circuit: Path | None = None
    """For a start from a circuit: a file of `mechctl search`."""
    dictionary: str | None = None
    """Id of the dictionary, where there are several."""
    gate: GateName | None = None
    """What opens the gate."""
    gate_layer: int | None = None
    """Layer of the gate."""
    layers: tuple[int, ...] | None = None
    """Layers to try."""
    strengths: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """Strengths to try."""
    counts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Numbers of features to try."""
    budgets: Budgets = Field(default_factory=Budgets)
    """What a point of the grid may cost."""
    answer_tokens: int = Field(default=24, ge=4)
    """Longest steered answer of the grid: a refusal says so at once."""
    most_discovery: int = Field(default=600, ge=4)
    """Most prompts of a side that gates are fitted on."""
    most_selection: int = Field(default=100, ge=2)
    """Most prompts of a side that the grid generates for."""
    pairs: int = Field(default=48, ge=2)
    """Target prompts whose wanted and own answers are compared."""
    steps: int = Field(default=300, ge=1)
    """Training steps of a gated-edit."""
    rank: int = Field(default=16, ge=1)
    """ReLU rows of a gated-edit at each layer, or most rows of word-rows."""
    suites: tuple[str, ...] = ()
    """Name of a suite that the policy is measured on."""
    defense_efficacy_min: Share | None = None
    """Least defense efficacy that the policy's Risk Card must show before it serves."""
    collateral_damage_max: Share | None = None
    """Most collateral damage that the policy's Risk Card may show for it to serve."""
    target_class: str | None = None
    """Class of the policy."""
    seed: int = 0
    """Seed of split, choices and training."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, needed in (("features", "ids or a file of them"), ("circuit", "a file")):
            value = getattr(self, name)
            if self.start == name and value is None:
                raise out_of_range(name, value, f"{needed}, as `start` is {name}")
            if self.start != name and value is not None:
                raise out_of_range(name, value, f"left out, as `start` is {self.start}")
        if self.start == "features" and self.method != "sae-feature":
            raise out_of_range("method", self.method, "sae-feature, as `start` is features")
        return self

    def record(self) -> dict[str, Any]:
        """Plain JSON, without folders of this machine."""
        plain = asdict(self) | {"contrast": self.contrast.name, "data_folder": None}
        plain["circuit"] = None if self.circuit is None else self.circuit.name
        plain["features"] = None if self.features is None else Path(self.features).name
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
