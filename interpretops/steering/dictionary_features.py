"""A dictionary's features in torch: their activations, and what they make of them again.

Shape letters: D width, F features.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from interpretops.artifacts.dictionary.weights import Weights


class DictionaryFeatures:
    """All features of a dictionary, whatever layout its weights came in."""

    def __init__(self, weights: Weights, like: Tensor | None = None) -> None:
        """``like``: a tensor of the device and number format to compute in; float32 on the CPU if None."""
        like = torch.zeros(()) if like is None else like
        self.read, self.bias, threshold = (torch.from_numpy(part).to(like) for part in weights.encoder_rows())
        self.threshold = threshold.clamp(min=0)
        self.write = torch.from_numpy(np.ascontiguousarray(weights.decoder_rows())).to(like)
        """[F, D]"""
        self.offset = torch.from_numpy(weights.offset).to(like)
        self.k = weights.k

    def encode(self, x: Tensor) -> Tensor:
        """Activations [..., F] of every feature for activations [..., D] of the model."""
        u = x @ self.read.T + self.bias
        active = torch.where(u > self.threshold, u, 0)
        if self.k is None:
            return active
        kept = active.topk(self.k, dim=-1)
        return torch.zeros_like(active).scatter(-1, kept.indices, kept.values)

    def decode(self, active: Tensor) -> Tensor:
        """The reconstruction [..., D]."""
        return active @ self.write + self.offset
