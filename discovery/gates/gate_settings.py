"""The settings of a learned gate and of the learned edit behind it."""

import math
from dataclasses import asdict
from typing import Any, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from discovery.jobs.job_settings import STRICT, out_of_range


@dataclass(frozen=True, config=STRICT)
class GateSettings:
    """What decides the gate, apart from data and model."""

    layers: tuple[int, ...] = (9, 12, 15)
    """Layers at which the probe reads, the lowest first; it decides at the last."""
    heads: int = Field(default=8, ge=1)
    """Heads of the probe at each of its layers."""
    probes: int = Field(default=1, ge=1)
    """Probes trained apart, each from its own beginning; the gate reads their mean."""
    window: int | None = Field(default=None, ge=8, le=65_536)
    """Tokens of the windows whose largest reading decides; none: one reading of the whole prompt."""
    examples: int = Field(default=16_000, ge=2)
    """Prompts that are drawn from the training groups to train the probe on."""
    epochs: int = Field(default=12, ge=1)
    """Times that the probe sees each of them."""
    batch_tokens: int = Field(default=12_000, ge=64)
    """Most tokens of a training step, padding included."""
    learning_rate: float = Field(default=2e-3, gt=0, lt=1)
    """Highest learning rate."""
    unseen_numbers: float = Field(default=0.2, ge=0, lt=1)
    """Share of each activation's numbers that a training step of the probe does not see."""
    weights: tuple[tuple[str, float], ...] = ()
    """Training groups that are drawn from N times as often as their size would have it, as
    benign_borderline=4."""
    benign_budget: float = Field(default=0.02, ge=0, le=1)
    """Share of the plain benign selection prompts that may newly be refused."""
    source_budget: float = Field(default=0.02, ge=0, le=1)
    """The same for each plain benign group of at least 100 selection prompts by itself."""
    borderline_budget: float = Field(default=0.12, ge=0, le=1)
    """The same for benign prompts that sound harmful, or come in a jailbreak's clothes."""
    seed: int = 0
    """Seed of weights and order."""

    @property
    def all_heads(self) -> int:
        """Heads of all probes at all layers; an engine keeps two numbers a token for each."""
        return self.heads * self.probes * max(len(self.layers), 1)

    def trained(self) -> dict[str, Any]:
        """What decides the training; the budgets only choose the threshold afterwards."""
        values = asdict(self)
        if self.window is None:
            del values["window"]  # trainings from before there were windows keep their identity
        return {name: value for name, value in values.items() if not name.endswith("_budget")}

    @model_validator(mode="after")
    def _check(self) -> Self:
        from steering_kernels.ops import MEMORY_COLUMNS  # imports torch, which `mechctl --help` must not

        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise out_of_range("layers", self.layers, "at least one layer, the lowest first")
        if self.all_heads > MEMORY_COLUMNS // 2:
            right = (
                f"fewer: `heads` x `probes` x `layers` is {self.heads} x {self.probes} x {len(self.layers)} "
                f"= {self.all_heads}, and an engine keeps {MEMORY_COLUMNS // 2}"
            )
            raise out_of_range("heads", self.heads, right)
        names = [name for name, _ in self.weights]
        if len(set(names)) < len(names) or not all(0 < weight < math.inf for _, weight in self.weights):
            raise out_of_range("weights", self.weights, "different groups, each with a number above 0")
        return self


@dataclass(frozen=True, config=STRICT)
class EditSettings:
    """What decides an edit, apart from data and model."""

    layers: tuple[int, ...] = (16, 19, 22)
    """Layers of the edit; all lie behind those of the gate."""
    rank: int = Field(default=16, ge=1)
    """ReLU rows at each layer."""
    steps: int = Field(default=300, ge=1)
    """Training steps of the edit."""
    batch: int = Field(default=8, ge=1)
    """Harmful prompts of a step; as many benign ones, when they count."""
    learning_rate: float = Field(default=3e-3, gt=0, lt=1)
    """Highest learning rate of the edit."""
    benign_weight: float = Field(default=0.0, ge=0)
    """Weight of leaving benign answers alone although the gate is open; 0: who opens it is refused."""
    firing_weight: float = 0.02
    """Weight of the edit's relative size on benign prompts (an L1 term on firing)."""
    seed: int = 0
    """Seed of weights and order."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.layers:
            raise out_of_range("layers", self.layers, "at least one layer")
        return self
