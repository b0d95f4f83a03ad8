"""The common form of all layouts: encoder and decoder matrices with their scales, whose rows are read lazily.

With activation x [D], features F:  u = encoder_scale * (W_enc (input_scale * x - centre)) + bias  [F]
and a feature's decoder row is  decoder_scale * W_dec / input_scale  [D].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from interpretops.artifacts.dictionary.manifest import Activation
from interpretops.plan import Array

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Matrix:
    """One vector of D per feature, stored in either orientation; only the requested rows are read."""

    array: npt.NDArray[Any]
    features_last: bool = False
    """Whether the array is [D, F] instead of [F, D]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(F, D)."""
        first, second = self.array.shape
        return (second, first) if self.features_last else (first, second)

    def rows(self, ids: Sequence[int] | None = None) -> Floats:
        """[K, D] float64: the rows of some features, or of all."""
        if ids is None:
            chosen = self.array.T if self.features_last else self.array
        else:
            index = np.asarray(ids, np.int64)
            chosen = self.array[:, index].T if self.features_last else self.array[index]
        return np.ascontiguousarray(chosen, np.float64)

    def norms(self) -> Floats:
        """[F] length of every row."""
        step = max(1, 2**22 // self.shape[1])
        parts = [range(i, min(i + step, self.shape[0])) for i in range(0, self.shape[0], step)]
        return np.concatenate([np.linalg.norm(self.rows(part), axis=1) for part in parts])


class EncoderRows(NamedTuple):
    """Encoder rows of K features, scales folded in: ``u = read . x + bias``, active above ``threshold``."""

    read: Array
    """[K, D] float32"""
    bias: Array
    """[K]"""
    threshold: Array
    """[K]"""


@dataclass(frozen=True, eq=False)
class Weights:
    """A dictionary's numbers, independent of their layout on disk."""

    activation: Activation
    encoder: Matrix
    decoder: Matrix
    bias: Floats
    """[F]"""
    centre: Floats
    """[D] subtracted from the activation before encoding: the decoder's bias, or zeros."""
    decoder_bias: Floats
    """[D]"""
    threshold: Floats | None = None
    """[F] for jumprelu: a feature is active above its threshold; never negative."""
    k: int | None = None
    """For topk: how many features are active at a token."""
    encoder_scale: Floats | None = None
    """[F]"""
    decoder_scale: Floats | None = None
    """[F]"""
    input_scale: float = 1.0

    def encoder_rows(self, ids: Sequence[int] | None = None) -> EncoderRows:
        """Float32 rows of some features, or all; the decoder's bias and the normalisation are folded in."""
        index: Any = slice(None) if ids is None else np.asarray(ids, np.int64)
        rows = self.encoder.rows(ids)
        if self.encoder_scale is not None:
            rows *= self.encoder_scale[index, None]
        bias = self.bias[index] - rows @ self.centre
        threshold = np.zeros(len(rows)) if self.threshold is None else self.threshold[index]
        return EncoderRows(
            (rows * self.input_scale).astype(np.float32),
            bias.astype(np.float32),
            threshold.astype(np.float32),
        )

    def decoder_rows(self, ids: Sequence[int] | None = None) -> Array:
        """[K, D] float32: what one unit of activation adds, in the model's scale."""
        rows = self.decoder.rows(ids)
        if self.decoder_scale is not None:
            index: Any = slice(None) if ids is None else np.asarray(ids, np.int64)
            rows *= self.decoder_scale[index, None]
        return (rows / self.input_scale).astype(np.float32)

    @cached_property
    def offset(self) -> Array:
        """[D] the reconstruction when no feature is active; edits never change it."""
        return (self.decoder_bias / self.input_scale).astype(np.float32)


def as_floats(array: npt.NDArray[Any]) -> Floats:
    """A float64 copy."""
    return np.array(array, np.float64)
