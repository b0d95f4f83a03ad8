"""A decoder's attention up to its output projection, with separate inputs per head and reuse of known tokens.

Shape letters: B sequences, T tokens, P earlier tokens, D width, H heads, K selected heads, F head width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from discovery.circuits.layer_names import LayerNames
from discovery.frozen_model import FrozenModel

Hook = Callable[[nn.Module, Any, Tensor], Tensor]
"""Takes a module, its arguments and its output, and returns a replacement output."""


class Attention:
    """Runs Hugging Face's attention modules up to the output projection.

    Tokens that no run changes are computed once: within `behind`, runs cover only the tokens after them.
    """

    def __init__(self, model: FrozenModel, projections: Sequence[nn.Module], names: LayerNames) -> None:
        self.model, self.projections, self.names = model, projections, names
        self.modules: list[Any] = [block.get_submodule(names.attention) for block in model.layers]
        self.heads, self.head_dim = model.spec.num_heads, model.spec.head_dim
        self._contexts: dict[int, list[dict[str, Any]]] = {}
        self._past: list[_Past] | None = None

    def every_head(self, layer: int, normed: Tensor) -> Tensor:
        """z [B, T, H, F] of heads that all read ``normed`` [B, T, D]."""
        return self._stopped(layer, normed, {}).view(*normed.shape[:2], self.heads, self.head_dim)

    def own_inputs(self, layer: int, normed: Tensor, heads: Sequence[int]) -> Tensor:
        """z [B, T, K, F] of K heads, each of which reads its own input from ``normed`` [K, B, T, D].

        Shared keys and values are computed again for each head, so attention has K of each.
        """
        groups: int = getattr(self.modules[layer], "num_key_value_groups", 1)
        shared = [head // groups for head in heads]
        width = self.head_dim if self.names.fused is None else 3 * self.head_dim

        def projected(rows: Sequence[int]) -> Hook:
            def hook(module: nn.Module, _args: Any, _output: Tensor) -> Tensor:
                weight = module.get_parameter("weight").view(-1, width, normed.shape[-1])[list(rows)]
                found = normed.flatten(1, 2) @ weight.transpose(1, 2)
                if module.bias is not None:
                    found = found + module.get_parameter("bias").view(-1, 1, width)[list(rows)]
                found = found.view(*normed.shape[:3], -1).permute(1, 2, 0, 3)
                return found.flatten(2)

            return hook

        if self.names.fused is not None:
            hooks = {self.names.fused: projected(heads)}
        else:
            hooks = {"q_proj": projected(heads), "k_proj": projected(shared), "v_proj": projected(shared)}
        z = self._stopped(layer, normed[0], hooks, shared)
        return z.view(*normed.shape[1:3], len(heads), self.head_dim)

    @contextmanager
    def recording(self) -> Iterator[list["_Past"]]:
        """Within the block, a run appends its keys and values to the yielded list, layer by layer."""
        assert self._past is None, "runs behind other tokens are not recorded"
        self._past = [_Past() for _ in self.modules]
        try:
            yield self._past
        finally:
            self._past = None

    @contextmanager
    def behind(self, past: list["_Past"]) -> Iterator[None]:
        """Within the block, all runs cover only the tokens after the recorded ones."""
        assert self._past is None, "one recording at a time"
        self._past = past
        try:
            yield
        finally:
            self._past = None

    def _stopped(
        self, layer: int, normed: Tensor, hooks: Mapping[str, Hook], shared: Sequence[int] | None = None
    ) -> Tensor:
        """The input of attention's output projection, [B, T, heads * F].

        hooks: replace the queries, keys and values computed from ``normed``
        shared: for each head, the index of the recorded keys and values that it reads
        """
        module = self.modules[layer]
        # Getting the context runs the model, so do it before adding the hook that stops attention.
        context = self._context(layer, normed.shape[1])
        if self._past is not None:
            self._past[layer].shared = shared
            context = context | {self.names.past: self._past[layer]}
        kept: list[Tensor] = []

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            kept.append(args[0])
            raise _StopAttention

        handles = [self.projections[layer].register_forward_pre_hook(keep)]
        for name, hook in hooks.items():  # skip computing what a hook replaces
            projection = module.get_submodule(name)
            handles += [projection.register_forward_pre_hook(_no_tokens)]
            handles += [projection.register_forward_hook(hook)]
        groups = getattr(module, "num_key_value_groups", None)
        if groups is not None and shared is not None:
            module.num_key_value_groups = 1
        try:
            with suppress(_StopAttention):
                module(hidden_states=normed, **context)
        finally:
            if groups is not None:
                module.num_key_value_groups = groups
            for handle in handles:
                handle.remove()
        return kept[0]

    def _context(self, layer: int, count: int) -> dict[str, Any]:
        """Attention's other arguments (mask, rotations) for the last ``count`` tokens."""
        before = 0 if self._past is None else self._past[layer].length
        context = self._whole_context(before + count)[layer]
        if not before:
            return context
        cut = {key: value[:, before:] for key, value in context.items() if key == "position_ids"}
        cut["position_embeddings"] = tuple(part[:, before:] for part in context["position_embeddings"])
        mask = context.get("attention_mask")
        if mask is None:
            ones = torch.ones(before + count, before + count, dtype=torch.bool, device=self.model.device)
            mask = ones.tril()[None, None]
        return context | cut | {"attention_mask": mask[:, :, before:]}

    def _whole_context(self, length: int) -> list[dict[str, Any]]:
        """The context of every layer, from a normal forward pass over ``length`` tokens."""
        if length not in self._contexts:
            found: list[dict[str, Any]] = []

            def keep(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
                skip = ("hidden_states", self.names.past, "use_cache", "cache_position")
                found.append({key: value for key, value in kwargs.items() if key not in skip})

            handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in self.modules]
            try:
                with torch.no_grad():
                    ids = torch.zeros(1, length, dtype=torch.long, device=self.model.device)
                    self.model.network.base_model(input_ids=ids, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            self._contexts[length] = found
        return self._contexts[length]


def _no_tokens(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0][:, :0],)


class _Past:
    """A layer's keys and values [B, KV, P, F] of earlier tokens; has the interface of transformers' cache."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.shared: Sequence[int] | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def update(self, keys: Tensor, values: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
        """Called by attention with new keys and values: the first call stores them, later calls append."""
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
            return keys, values
        old = (self.keys, self.values)
        if self.shared is not None:
            old = (self.keys[:, list(self.shared)], self.values[:, list(self.shared)])
        return torch.cat([old[0], keys], 2), torch.cat([old[1], values], 2)


class _StopAttention(Exception):  # noqa: N818 (not an error: it ends attention before its output projection)
    """The heads' outputs have been captured."""
