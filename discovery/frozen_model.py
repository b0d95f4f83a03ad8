"""A Hugging Face model whose weights stay as they are: chat formatting, residual capture, residual editing.

Shape letters: B sequences, T tokens, D width. The residual stream after layer l is the output of decoder
layer l, named ``blocks.<l>.hook_resid_post`` as TransformerLens and SAELens name it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discovery.errors import DiscoveryError
from interpretops.model.spec import read_model_spec
from interpretops.plan import ModelSpec
from interpretops.steering.hook_points import find_layers
from interpretops.steering.hooked_model import load_network, load_tokenizer

Edit = Callable[[Tensor], Tensor]
"""Takes the residual stream [B, T, D] and returns the edited one."""


def hook_name(layer: int) -> str:
    """SAELens' name of the residual stream after a layer."""
    return f"blocks.{layer}.hook_resid_post"


class FrozenModel:
    """Model, tokenizer and spec of a local folder. Raises `ModelError` when the folder cannot be used."""

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
    ) -> None:
        self.folder = Path(folder)
        self.spec: ModelSpec = read_model_spec(self.folder)
        self.device = torch.device(device)
        self.tokenizer: Any = load_tokenizer(self.folder)
        self.network: Any = load_network(self.folder, dtype).to(self.device).eval().requires_grad_(False)
        self.layers: nn.ModuleList = find_layers(self.network, self.spec.num_layers)
        self.pad_id: int = next(
            int(token)
            for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            if token is not None
        )

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end an answer."""
        named = self.network.generation_config.eos_token_id
        named = self.tokenizer.eos_token_id if named is None else named
        return list(named) if isinstance(named, list) else [] if named is None else [int(named)]

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise `DiscoveryError` for a layer that the model does not have."""
        for layer in layers:
            if not 0 <= layer < self.spec.num_layers:
                raise DiscoveryError(
                    f"layer = {layer}, but {self.spec.name} has layers 0..{self.spec.num_layers - 1}"
                )

    def chat_ids(self, prompt: str, most: int | None = None) -> list[int]:
        """Token ids of one user turn in the model's own chat format, ready for its answer.

        With ``most`` the *prompt* is cut so that the whole is no longer than that.
        """
        ids = self._chat_ids(prompt)
        while most is not None and len(ids) > most:
            cut = len(prompt) * (most - 4) // len(ids)
            if cut < 1:
                raise DiscoveryError(f"context = {most}, but the chat format alone takes {len(ids)} tokens")
            prompt = prompt[:cut]
            ids = self._chat_ids(prompt)
        return ids

    def _chat_ids(self, prompt: str) -> list[int]:
        if self.tokenizer.chat_template is None:
            return self.text_ids(prompt)
        messages = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, no special tokens added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def pad(self, sequences: Sequence[Sequence[int]], side: str = "right") -> tuple[Tensor, Tensor]:
        """Token ids and mask [B, T] of sequences of unequal length."""
        longest = max(len(ids) for ids in sequences)
        tokens = torch.full((len(sequences), longest), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(sequences):
            place = slice(0, len(ids)) if side == "right" else slice(longest - len(ids), longest)
            tokens[row, place] = torch.tensor(ids, dtype=torch.long)
            mask[row, place] = 1
        return tokens.to(self.device), mask.to(self.device)

    @torch.no_grad()
    def residuals(self, tokens: Tensor, mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Residual stream [B, T, D] after each named layer; the layers above the last are not run."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Edit:
            def edit(x: Tensor) -> Tensor:
                kept[layer] = x
                if layer == max(layers):
                    raise _Enough
                return x

            return edit

        with self.edited({layer: keep(layer) for layer in layers}), suppress(_Enough):
            self.network.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return kept

    @contextmanager
    def edited(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        """Within the block the residual stream after each named layer passes through its edit."""
        handles = [self.layers[layer].register_forward_hook(_hook(edit)) for layer, edit in edits.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[Sequence[int]], most: int, *, sample_seed: int | None = None
    ) -> list[list[int]]:
        """Answers of at most ``most`` tokens to formatted prompts, end-of-turn tokens included.

        Greedy; with ``sample_seed`` drawn from the model's own distribution (temperature 1), which the same
        prompts in the same order with the same seed repeat.
        """
        drawn: dict[str, Any] = {"do_sample": False}
        if sample_seed is not None:
            torch.manual_seed(sample_seed)
            drawn = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        tokens, mask = self.pad(prompts, side="left")
        stops = self.stop_ids
        out = self.network.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=most,
            **drawn,
            eos_token_id=stops or None,
            pad_token_id=self.pad_id,
        )
        found = []
        for row in out[:, tokens.shape[1] :].tolist():
            ends = [index for index, token in enumerate(row) if token in stops]
            found.append(row[: ends[0] + 1] if ends else row)
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))


class _Enough(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    """The last wanted layer has been seen."""


def _hook(edit: Edit) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return hook


def norm_bound(norms: Tensor, ratio: float) -> float:
    """The norm above which a token is an attention sink: ``ratio`` times the median norm.

    The median does not move when a few tokens have norms two orders above the rest, as sinks have.
    """
    finite = norms[torch.isfinite(norms)]
    if finite.numel() == 0:
        raise DiscoveryError("no finite activation norms were measured; check the model")
    return float(finite.float().median()) * ratio
