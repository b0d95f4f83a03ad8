"""Opens a dictionary's folder: the manifest, the weights in any layout, and the rows that edits use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from interpretops.artifacts.dictionary import dictionary_learning, gemma_scope, saelens, sparsify
from interpretops.artifacts.dictionary.agreement import check_agreement
from interpretops.artifacts.dictionary.manifest import (
    MANIFEST_NAME,
    Activation,
    DictionaryManifest,
    Layout,
    check_weights,
    read_manifest,
)
from interpretops.artifacts.dictionary.weights import EncoderRows, Weights
from interpretops.errors import DictionaryError
from interpretops.plan import Array, Site

_LOADERS: dict[Layout, Callable[[Path, Path], Weights]] = {
    "saelens": saelens.load_saelens,
    "gemma_scope": gemma_scope.load_gemma_scope,
    "sparsify": sparsify.load_sparsify,
    "dictionary_learning": dictionary_learning.load_dictionary_learning,
}


@dataclass(frozen=True, eq=False)
class Dictionary:
    """The features at one site of one model."""

    manifest: DictionaryManifest
    weights: Weights

    @property
    def site(self) -> Site:
        """The site whose activation it reads."""
        return self.manifest.site

    @property
    def activation(self) -> Activation:
        """`relu`, `jumprelu` or `topk`."""
        return self.weights.activation

    @property
    def k(self) -> int | None:
        """For topk: how many features are active at a token."""
        return self.weights.k

    @property
    def width(self) -> int:
        """Number of features."""
        return self.manifest.width

    @property
    def max_norm(self) -> float:
        """Tokens with a larger activation norm are not edited; infinite if the manifest has no bound."""
        return float("inf") if self.manifest.max_norm is None else self.manifest.max_norm

    def encoder_rows(self, ids: Sequence[int] | None = None) -> EncoderRows:
        """`Weights.encoder_rows`."""
        return self.weights.encoder_rows(ids)

    def decoder_rows(self, ids: Sequence[int] | None = None) -> Array:
        """`Weights.decoder_rows`."""
        return self.weights.decoder_rows(ids)

    @property
    def decoder_bias(self) -> Array:
        """`Weights.offset`."""
        return self.weights.offset


def open_dictionary(folder: Path, manifest: DictionaryManifest | None = None) -> Dictionary:
    """Open a folder with manifest.yaml. Checks the weights' sha256 and shapes; raises `DictionaryError`."""
    manifest = read_manifest(folder) if manifest is None else manifest
    if manifest.layout == "dictionary_learning" and manifest.weights.file == dictionary_learning.PICKLE_NAME:
        raise DictionaryError(f"{folder / manifest.weights.file}: {dictionary_learning.CONVERSION}")
    path = check_weights(folder, manifest.weights, DictionaryError)
    check_agreement(folder, manifest)
    return Dictionary(manifest, _fit(folder, manifest, _LOADERS[manifest.layout](folder, path)))


def _fit(folder: Path, manifest: DictionaryManifest, weights: Weights) -> Weights:
    """Return the weights after checking them against the manifest."""
    file, features, size = folder / MANIFEST_NAME, manifest.width, manifest.hidden_size
    source = folder / manifest.weights.file
    if weights.encoder.array.ndim != 2 or weights.encoder.shape != weights.decoder.shape:
        raise DictionaryError(f"{source}: encoder and decoder have different shapes")
    if weights.encoder.shape != (features, size):
        raise DictionaryError(
            f"{file}: width = {features}, hidden_size = {size}, but {manifest.weights.file} holds "
            f"{weights.encoder.shape[0]} features of an activation of {weights.encoder.shape[1]}"
        )
    for name in ("bias", "threshold", "encoder_scale", "decoder_scale", "centre", "decoder_bias"):
        array = getattr(weights, name)
        expected = (size,) if name in ("centre", "decoder_bias") else (features,)
        if array is not None and (array.shape != expected or not np.isfinite(array).all()):
            raise DictionaryError(
                f"{source}: {name} must be {expected[0]} finite numbers, but has shape "
                f"{array.shape}" + ("" if array.shape != expected else " and holds others")
            )
    if weights.activation != manifest.activation:
        raise DictionaryError(
            f"{file}: activation = {manifest.activation!r}, but the weights are of {weights.activation!r}"
        )
    if manifest.normalisation == "scale":
        if manifest.scaling_factor is None:
            raise DictionaryError(f"{file}: normalisation = 'scale' needs a scaling_factor")
        return replace(weights, input_scale=weights.input_scale * manifest.scaling_factor)
    if manifest.scaling_factor is not None:
        raise DictionaryError(f"{file}: scaling_factor is given, but normalisation = 'none'")
    return weights
