"""The settings of a proposal: everything that determines it, apart from model and data."""

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
"""The remedy for a work folder of another proposal."""


@dataclass(frozen=True, config=STRICT)
class Budgets:
    """The most damage that a policy may do on selection prompts that it is not meant for."""

    benign: Share = 0.02
    """Largest share of benign selection prompts that may newly fail."""
    borderline: Share = 0.12
    """Largest share of borderline selection prompts that may newly fail."""
    text: float = 0.02
    """For classes to avoid: largest rise of benign text's cross-entropy, in nats per token."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProposeSettings:
    """Options of `mechctl propose`."""

    start: Start = "contrast"
    """What determines where to act."""
    method: MethodName = "direction"
    """Kind of edit."""
    contrast: Path
    """Class file (YAML), pairs of `mechctl search`, or a data list of `fit-gate`."""
    policy_id: str | None = None
    """Id of the policy."""
    data_folder: Path | None = None
    """Folder of the contrast's files, if not its own."""
    features: str | None = None
    """With --from features: ids such as 12,40, or a file of them."""
    circuit: Path | None = None
    """With --from circuit: a circuit file of `mechctl search`."""
    dictionary: str | None = None
    """Id of the dictionary, if there are several."""
    gate: GateName | None = None
    """What opens the gate."""
    gate_layer: int | None = None
    """Layer at which the gate reads."""
    layers: tuple[int, ...] | None = None
    """Layers to try."""
    strengths: Annotated[tuple[float, ...], Field(min_length=1)] | None = None
    """Strengths to try."""
    counts: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Numbers of features to try."""
    budgets: Budgets = Field(default_factory=Budgets)
    """The most damage that a point of the grid may do."""
    answer_tokens: int = Field(default=24, ge=4)
    """Most tokens of a steered answer in the grid: a refusal shows at once."""
    most_discovery: int = Field(default=600, ge=4)
    """Most prompts per side to fit gates on."""
    most_selection: int = Field(default=100, ge=2)
    """Most prompts per side to answer in the grid."""
    pairs: int = Field(default=48, ge=2)
    """Target prompts whose wanted answers are compared with the model's own."""
    steps: int = Field(default=300, ge=1)
    """Training steps of a gated-edit."""
    rank: int = Field(default=16, ge=1)
    """ReLU rows per layer of a gated-edit, or most rows of word-rows."""
    suites: tuple[str, ...] = ()
    """Suite to measure the policy on."""
    defense_efficacy_min: Share | None = None
    """Lowest defense efficacy with which the policy may serve, by its Risk Card."""
    collateral_damage_max: Share | None = None
    """Highest collateral damage with which the policy may serve, by its Risk Card."""
    target_class: str | None = None
    """Class of the policy."""
    seed: int = 0
    """Seed of split, sampling and training."""

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
        """Plain JSON, without local folder names."""
        plain = asdict(self) | {"contrast": self.contrast.name, "data_folder": None}
        plain["circuit"] = None if self.circuit is None else self.circuit.name
        plain["features"] = None if self.features is None else Path(self.features).name
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
