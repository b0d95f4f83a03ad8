"""A Hugging Face causal language model on this machine: text in, text out, its activations on request.

Shape letters: T tokens, V vocabulary, D width of a site.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from interpretops.errors import ModelError, refused_plainly
from interpretops.model.device import pick_device
from interpretops.model.family import family_of
from interpretops.model.source import resolve_model
from interpretops.plan import POINTS, Site
from interpretops.settings import load_settings
from interpretops.steering.answer_loop import continue_tokens, drawn, greedy
from interpretops.steering.causal_model import CausalModel
from interpretops.steering.hook_points import site_module

DTYPES: dict[str, torch.dtype | str] = {
    "auto": "auto",
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def _silent(line: str) -> None:
    """Show nothing."""


class HookedModel(CausalModel):
    """Model, tokenizer and spec of a folder. Omitted arguments come from the settings.

    Only safetensors are loaded, and nothing is downloaded for a folder or the default model.
    """

    @refused_plainly
    def __init__(
        self,
        model_name: str | Path | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        cache_dir: str | Path | None = None,
        revision: str | None = None,
        progress: Callable[[str], None] = _silent,
    ) -> None:
        """
        model_name  the default model's name, a folder, or a Hugging Face id
        dtype       `bfloat16`, `float16`, `float32`, `auto` (the model's own), or a torch dtype
        device      `cpu`, `cuda`, `cuda:<n>`, or `auto`: a GPU if there is one
        cache_dir   where the default model is created
        revision    branch, tag or commit of a Hugging Face id

        Raises `ModelError` if the model is missing, unreadable, or has unknown edit sites.
        """
        settings = load_settings()
        if model_name is None:
            model_name, revision = settings.model.name, revision or settings.model.revision
        wanted = _dtype(settings.model.dtype if dtype is None else dtype)
        cache = settings.cache.dir if cache_dir is None else Path(cache_dir)
        folder = resolve_model(str(model_name), cache, progress, revision=revision)
        progress(f"Loading {folder.resolve().name}")
        super().__init__(
            folder, wanted, device=pick_device(settings.model.device if device is None else device)
        )
        self.scoring = False
        """Whether the current pass reads a whole text at once instead of generating a token."""

    def tokens(self, text: str, *, chat: bool | None = None) -> list[int]:
        """Token ids of a text.

        chat  True formats the text as the user's turn, ready for the answer; False uses the text as it
              is; None means True if the model has a chat template
        """
        if not isinstance(text, str) or not text:
            raise ModelError(f"text = {text!r}, but must be text that is not empty")
        if chat is None:
            chat = self.has_chat_template
        if not chat:
            return list(self.tokenizer(text).input_ids)
        return self.conversation_ids([{"role": "user", "content": text}])

    def generate(
        self,
        text: str,
        max_new_tokens: int = 64,
        *,
        chat: bool | None = None,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> str:
        """The model's answer to a text (see `tokens` for ``chat``); greedy at temperature 0."""
        answer = self.generate_tokens(
            self.tokens(text, chat=chat), max_new_tokens, temperature=temperature, seed=seed
        )
        return self.decode(answer)

    def generate_tokens(
        self,
        token_ids: Sequence[int],
        max_new_tokens: int = 64,
        *,
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> list[int]:
        """Continue token ids until a stop token (not included) or the end of the model's context."""
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens}, but must be at least 1")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ValueError(f"temperature = {temperature}, but must be 0 (greedy) or positive")
        tokens = self._batch_of(token_ids)
        chance = torch.Generator(self.device)
        if seed is None:
            chance.seed()
        else:
            chance.manual_seed(seed)
        room = self.network.config.max_position_embeddings - len(token_ids) + 1
        (answer,) = continue_tokens(
            self.network,
            tokens,
            min(max_new_tokens, room),
            stops=self.stop_tokens,
            pad=0,  # of one sequence, which needs none
            choose=greedy if temperature == 0 else drawn(chance, temperature),
        )
        return self.without_stop(answer)

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int]) -> Tensor:
        """[T, V] float32: after each of T tokens, the log-probability of every next token."""
        ids = self._batch_of(token_ids)
        with self._reading():
            logits = self.network(input_ids=ids, use_cache=False).logits[0]
        logprobs: Tensor = logits.float().log_softmax(-1)
        return logprobs

    @torch.no_grad()
    def run_with_cache(
        self, text: str | Sequence[int], sites: Iterable[Site | str], *, chat: bool | None = False
    ) -> dict[Site, Tensor]:
        """Activations [T, D] of a text (or of token ids) at each site, after any edits there.

        Edits act only within a `SteeringSession`. Sites may be written as ``"15.resid_post"``.
        """
        wanted = [self._site(site) for site in sites]
        ids = self.tokens(text, chat=chat) if isinstance(text, str) else text
        kept: dict[Site, Tensor] = {}
        handles = [self._keep(site, kept) for site in wanted]
        try:
            with self._reading():
                self.network.base_model(input_ids=self._batch_of(ids), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return kept

    @contextmanager
    def _reading(self) -> Iterator[None]:
        self.scoring = True
        try:
            yield
        finally:
            self.scoring = False

    def _keep(self, site: Site, kept: dict[Site, Tensor]) -> torch.utils.hooks.RemovableHandle:
        module = site_module(self.layers, family_of(self.spec.architecture), site)

        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            kept[site] = args[0].flatten(0, -2).clone()

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            kept[site] = (output[0] if isinstance(output, tuple) else output).flatten(0, -2).clone()

        if site.point == "attn_z":
            return module.register_forward_pre_hook(before)
        return module.register_forward_hook(after)

    def _site(self, site: Site | str) -> Site:
        site = Site.parse(site) if isinstance(site, str) else site
        if site.point not in POINTS or not 0 <= site.layer < self.spec.num_layers:
            raise ModelError(
                f"site = {site}, but {self.spec.name} has layers 0..{self.spec.num_layers - 1} "
                f"and points {', '.join(POINTS)}"
            )
        return site

    def _batch_of(self, token_ids: Sequence[int]) -> Tensor:
        ids = torch.as_tensor(token_ids)
        if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
            raise ValueError(
                f"token_ids must be a flat, non-empty list of ids, not of shape {list(ids.shape)}"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= self.spec.vocab_size:
            raise ValueError(
                f"token_ids lie in {int(ids.min())}..{int(ids.max())}, "
                f"but {self.spec.name} has 0..{self.spec.vocab_size - 1}"
            )
        most = self.network.config.max_position_embeddings
        if len(ids) > most:
            raise ModelError(
                f"{len(ids)} tokens, but {self.spec.name} takes at most {most}; shorten the text"
            )
        return ids[None].to(self.device, torch.long)


def _dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype = {name!r}, but must be one of {', '.join(DTYPES)}")
    return DTYPES[name]
