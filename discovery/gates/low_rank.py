"""Trainable ReLU rows at a few layers of the residual stream, applied in a plan as `lora_gate` units."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from discovery.frozen_model import Edit


class LowRankRows(nn.Module):
    """``x' = x + n B relu(A x / n + b)`` at each layer, where n is the layer's typical norm.

    Shape letters: R rows, D width. Tokens whose norm exceeds the layer's bound are not edited.
    """

    def __init__(
        self,
        hidden_size: int,
        rank: int,
        norms: Mapping[int, float],
        seed: int,
        *,
        bounds: Mapping[int, float] | None = None,
        bias: float = 0.0,
        write: float = 0.01,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norms = dict(norms)
        self.bounds = {layer: float("inf") if bounds is None else bounds[layer] for layer in norms}
        self.a = nn.ParameterDict()
        self.b = nn.ParameterDict()
        self.bias = nn.ParameterDict()
        for layer in self.norms:
            directions = torch.randn(rank, hidden_size, generator=generator) / hidden_size**0.5
            self.a[str(layer)] = nn.Parameter(directions)
            self.b[str(layer)] = nn.Parameter(torch.randn(rank, hidden_size, generator=generator) * write)
            self.bias[str(layer)] = nn.Parameter(torch.full((rank,), bias))
        self.firing: list[Tensor] = []
        """Size of the edit per token at each layer of the last forward pass, in units of the layer's norm."""

    def at(self, layer: int) -> Edit:
        """The edit of one layer."""
        key, norm, bound = str(layer), self.norms[layer], self.bounds[layer]

        def edit(x: Tensor) -> Tensor:
            whole = x.float()
            fired = relu((whole / norm) @ self.a[key].T + self.bias[key])
            change = fired @ self.b[key]
            if bound < float("inf"):
                change = change * (whole.norm(dim=-1, keepdim=True) <= bound)
            self.firing.append(change.norm(dim=-1))
            edited: Tensor = (whole + norm * change).to(x.dtype)
            return edited

        return edit

    def rows(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """(read [R, D], bias [R], write [R, D]) in the model's units, on the CPU."""
        key, norm = str(layer), self.norms[layer]
        return (
            (self.a[key] / norm).detach().cpu().clone(),
            self.bias[key].detach().cpu().clone(),
            (self.b[key] * norm).detach().cpu().clone(),
        )
