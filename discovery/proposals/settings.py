"""What decides a proposal, apart from model and data."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from discovery.errors import DiscoveryError

Start = Literal["contrast", "features", "circuit"]
MethodName = Literal["direction", "sae-feature", "gated-edit", "word-rows"]
GateName = Literal["probe", "features"]


@dataclass(frozen=True)
class Budgets:
    """The most that a policy may cost what it is not for, on the selection prompts."""

    benign: float = 0.02
    """Share of benign prompts that may newly fail."""
    borderline: float = 0.12
    """The same for borderline prompts."""
    text: float = 0.02
    """Rise of the cross-entropy of benign text, in nats per token; for classes to avoid."""


@dataclass(frozen=True)
class ProposeSettings:
    """Options of `mechctl propose`."""

    start: Start
    method: MethodName
    contrast: Path
    policy_id: str | None = None
    data_folder: Path | None = None
    features: str | None = None
    circuit: Path | None = None
    dictionary: str | None = None
    gate: GateName | None = None
    gate_layer: int | None = None
    layers: tuple[int, ...] | None = None
    strengths: tuple[float, ...] | None = None
    counts: tuple[int, ...] = (1, 2, 4, 8)
    budgets: Budgets = field(default_factory=Budgets)
    answer_tokens: int = 24
    """Longest steered answer of the grid: a refusal says so at once."""
    most_discovery: int = 600
    """Prompts of a side that gates are fitted on."""
    most_selection: int = 100
    """Prompts of a side that the grid generates for."""
    pairs: int = 48
    """Target prompts whose wanted and own answers are compared."""
    steps: int = 300
    rank: int = 16
    """Of the learned edit; most rows of word-rows."""
    suites: tuple[str, ...] = ()
    defense_efficacy_min: float | None = None
    """The policy's bar; with one it serves only once its Risk Card meets it."""
    collateral_damage_max: float | None = None
    target_class: str | None = None
    seed: int = 0

    def check(self) -> None:
        """Raise `DiscoveryError` for a value that makes no sense, before anything is loaded."""
        for name, choices in (("start", Start), ("method", MethodName)):
            value = getattr(self, name)
            if value not in get_args(choices):
                shown = "from" if name == "start" else name
                raise DiscoveryError(
                    f"--{shown} = {value!r}, but must be one of {', '.join(get_args(choices))}"
                )
        if self.gate not in (None, *get_args(GateName)):
            raise DiscoveryError(
                f"--gate = {self.gate!r}, but must be one of {', '.join(get_args(GateName))}"
            )
        for needed, value in (("features", self.features), ("circuit", self.circuit)):
            if (self.start == needed) != (value is not None):
                word = "needs" if value is None else "alone takes"
                raise DiscoveryError(f"--from {needed} {word} --{needed}; it is given {value!r}")
        if self.start == "features" and self.method != "sae-feature":
            raise DiscoveryError(f"--from features, but --method {self.method} uses none; take sae-feature")
        for name, good in (
            ("strengths", self.strengths is None or len(self.strengths) > 0),
            ("counts", len(self.counts) > 0 and min(self.counts) >= 1),
            ("benign-budget", 0 <= self.budgets.benign <= 1),
            ("borderline-budget", 0 <= self.budgets.borderline <= 1),
            ("answer-tokens", self.answer_tokens >= 4),
            ("most-discovery", self.most_discovery >= 4),
            ("most-selection", self.most_selection >= 2),
            ("pairs", self.pairs >= 2),
            ("defense-efficacy-min", 0 <= (self.defense_efficacy_min or 0) <= 1),
            ("collateral-damage-max", 0 <= (self.collateral_damage_max or 0) <= 1),
        ):
            if not good:
                raise DiscoveryError(f"--{name} is out of range; see mechctl propose --help")

    def record(self) -> dict[str, Any]:
        """Plain JSON, without folders of this machine."""
        from dataclasses import asdict

        plain = asdict(self) | {"contrast": self.contrast.name, "data_folder": None}
        plain["circuit"] = None if self.circuit is None else self.circuit.name
        plain["features"] = None if self.features is None else Path(self.features).name
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}
