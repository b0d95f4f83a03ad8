"""A model for offline jobs: captures and edits the residual stream, in batches.

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
from interpretops.model.device import pick_device
from interpretops.model.source import resolve_model
from interpretops.settings import Settings
from interpretops.steering.causal_model import CausalModel

Edit = Callable[[Tensor], Tensor]
"""Takes the residual stream [B, T, D] and returns the edited one."""


def hook_name(layer: int) -> str:
    """SAELens' name of the residual stream after a layer."""
    return f"blocks.{layer}.hook_resid_post"


class FrozenModel(CausalModel):
    """A model in a local folder, run in batches. Raises `ModelError` if the folder holds none."""

    def __init__(
        self, folder: Path, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(folder, dtype, torch.device(device))

    def check_layers(self, layers: Sequence[int]) -> None:
        """Raise `DiscoveryError` for a layer that the model does not have."""
        for layer in layers:
            if not 0 <= layer < self.spec.num_layers:
                raise DiscoveryError(
                    f"layer = {layer}, but {self.spec.name} has layers 0..{self.spec.num_layers - 1}"
                )

    def chat_ids(self, prompt: str, most: int | None = None) -> list[int]:
        """Token ids of one user turn in the model's own chat format, ready for its answer.

        ``most`` is the largest number of ids; a longer prompt is cut, the chat format is not.
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
        if not self.has_chat_template:
            return self.text_ids(prompt)
        return self.conversation_ids([{"role": "user", "content": prompt}])

    @torch.no_grad()
    def residuals(self, tokens: Tensor, mask: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
        """Residual stream [B, T, D] after each of ``layers``; later layers are not run."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Edit:
            def edit(x: Tensor) -> Tensor:
                kept[layer] = x
                if layer == max(layers):
                    raise _StopForward
                return x

            return edit

        with self.edited({layer: keep(layer) for layer in layers}), suppress(_StopForward):
            self.network.base_model(input_ids=tokens, attention_mask=mask, use_cache=False)
        return kept

    @contextmanager
    def edited(self, edits: Mapping[int, Edit]) -> Iterator[None]:
        """Within the block, each edit is applied to the residual stream after its layer."""
        handles = [self.layers[layer].register_forward_hook(_hook(edit)) for layer, edit in edits.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def open_frozen_model(
    settings: Settings, say: Callable[[str], None], dtype: torch.dtype | None = None
) -> FrozenModel:
    """The model that the settings name, downloaded if need be.

    dtype  of its weights; None: the settings', where "auto" is bfloat16
    """
    device = pick_device(settings.model.device)
    folder = resolve_model(settings.model.name, settings.cache.dir, say, revision=settings.model.revision)
    if dtype is None:
        dtype = torch.bfloat16 if settings.model.dtype == "auto" else getattr(torch, settings.model.dtype)
    return FrozenModel(folder, dtype, device)


class _StopForward(Exception):  # noqa: N818 (not an error: it ends a forward pass early)
    """The last layer that is wanted has run."""


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
