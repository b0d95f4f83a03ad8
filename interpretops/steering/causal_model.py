"""A Hugging Face causal language model in a folder: loading, tokenizing and generating.

The SDK extends it as `HookedModel`, offline jobs as discovery's `FrozenModel`. Shape letters: B sequences,
T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from interpretops.errors import ModelError
from interpretops.model.spec import read_model_spec
from interpretops.plan import ModelSpec
from interpretops.steering.answer_loop import Choose, continue_tokens, drawn, greedy, pad_tokens
from interpretops.steering.hook_points import find_layers


class CausalModel:
    """Model, tokenizer and spec of a folder, loaded only from safetensors; the weights never change."""

    def __init__(self, folder: Path, dtype: torch.dtype | str, device: torch.device) -> None:
        """Raises `ModelError` if the folder cannot be used."""
        self.folder = Path(folder)
        self.spec: ModelSpec = read_model_spec(self.folder)
        self.device = device
        self.network: Any = load_network(self.folder, dtype).to(device).eval().requires_grad_(False)
        """The transformers model itself."""
        self.layers: nn.ModuleList = find_layers(self.network, self.spec.num_layers)

    @property
    def dtype(self) -> torch.dtype:
        """The number format of weights and activations."""
        dtype: torch.dtype = self.network.dtype
        return dtype

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, read on first use."""
        return load_tokenizer(self.folder)

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer, the most common first."""
        named = self.network.generation_config.eos_token_id
        if named is None:
            named = self.network.config.eos_token_id
        return list(named) if isinstance(named, list) else [] if named is None else [int(named)]

    @property
    def stop_tokens(self) -> frozenset[int]:
        """Tokens that end an answer."""
        return frozenset(self.stop_ids)

    @cached_property
    def pad_id(self) -> int:
        """The padding token for shorter sequences in a batch."""
        named = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(int(token) for token in named if token is not None)

    @property
    def has_chat_template(self) -> bool:
        """Whether the model has a chat template."""
        return self.tokenizer.chat_template is not None

    def conversation_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation in the model's chat format, ready for the answer.

        The model continues a final assistant message. Raises `ModelError` if the model has no chat template.
        """
        if not self.has_chat_template:
            raise ModelError(f"{self.spec.name} has no chat template; pass chat=False")
        begun = messages[-1]["role"] == "assistant"
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=not begun, continue_final_message=begun
        )
        return self.text_ids(text)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without added special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def pad(
        self, sequences: Sequence[Sequence[int]], side: Literal["left", "right"] = "right"
    ) -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, T] of sequences of unequal length, on the model's device."""
        return pad_tokens(sequences, self.pad_id, self.device, side)

    def answers(
        self, prompts: Sequence[Sequence[int]], most: int, *, sample_seed: int | None = None
    ) -> list[list[int]]:
        """Answers of at most ``most`` tokens to formatted prompts, end-of-turn tokens included.

        Greedy; with ``sample_seed``, sampled at temperature 1. The same prompts, order and seed give the same
        answers. Steered within a `SteeringSession`.
        """
        choose: Choose = greedy
        if sample_seed is not None:
            choose = drawn(torch.Generator(self.device).manual_seed(sample_seed))
        tokens, mask = self.pad(prompts, side="left")
        return continue_tokens(
            self.network, tokens, most, mask=mask, stops=self.stop_tokens, pad=self.pad_id, choose=choose
        )

    def without_stop(self, answer: Sequence[int]) -> list[int]:
        """An answer without the stop token that ended it."""
        return list(answer[:-1] if answer and answer[-1] in self.stop_tokens else answer)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer in a model folder; raises `ModelError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: no tokenizer can be read ({_first_line(error)})") from error


def load_network(folder: Path, dtype: torch.dtype | str) -> Any:
    """Load the transformers model in a folder, only from safetensors; raises `ModelError`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
        # torch's fused attention has no soft cap, and transformers would silently ignore it.
        eager = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
        return AutoModelForCausalLM.from_pretrained(
            str(folder), config=config, dtype=dtype, local_files_only=True, use_safetensors=True, **eager
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"{folder}: transformers cannot load it ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
