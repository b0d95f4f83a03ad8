"""The settings of a trace."""

from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from discovery.jobs.job_settings import STRICT, out_of_range


@dataclass(frozen=True, config=STRICT)
class TraceSettings:
    """What decides the content of a trace, apart from data and model."""

    layers: tuple[int, ...] = ()
    """Layers to trace in one pass. None given: the one in the middle of the model, where features are most
    abstract and still act."""
    context: int = Field(default=256, ge=8)
    """Most tokens of a sequence; text is cut into pieces of this length."""
    answer_tokens: int = Field(default=0, ge=0)
    """Length of the model's own greedy answer that follows each prompt; 0: none."""
    written_tokens: int = Field(default=0, ge=0)
    """Length of the text that the model samples after each opening; 0 where there are no openings."""
    shard_sequences: int = Field(default=256, ge=1)
    """Sequences in a shard; a stopped trace loses at most one shard."""
    held_out_share: float = Field(default=0.03, ge=0, lt=1)
    """Share of the sequences that is kept out, to measure on."""
    dtype: Literal["float16", "bfloat16"] = "bfloat16"
    """How activations are stored."""
    sink_ratio: float = Field(default=8.0, gt=1)
    """A token whose norm exceeds this many medians is an attention sink and is left out."""
    seed: int = 0
    """Seed of the order of the sequences and of what the model samples."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(set(self.layers)) < len(self.layers):
            raise out_of_range("layers", self.layers, "different layers, each named once")
        for name in ("answer_tokens", "written_tokens"):
            if (value := getattr(self, name)) >= self.context:
                raise out_of_range(name, value, f"less than `context`, which is {self.context}")
        return self
