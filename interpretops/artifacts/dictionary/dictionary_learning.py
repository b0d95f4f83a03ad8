"""The dictionary_learning layout: config.json and a safetensors export of ae.pt, which is never opened.

Activations are in the units of the library's release 0.1.0: what ``encode`` returns after
``from_pretrained``, both with their defaults.
"""

from pathlib import Path
from typing import Any

import numpy as np

from interpretops.artifacts.dictionary.saelens import gated_threshold
from interpretops.artifacts.dictionary.weights import Matrix, Weights, as_floats
from interpretops.errors import DictionaryError
from interpretops.files.json_file import read_json_object
from interpretops.files.tensor_file import TensorFile

WEIGHTS_NAME = "ae.safetensors"
PICKLE_NAME = "ae.pt"
CONVERSION = (
    "ae.pt is a pickle, which can run code and is never loaded; if you trust it, convert it: python -c "
    "\"import torch, safetensors.torch as s; d = torch.load('ae.pt', map_location='cpu', weights_only=True); "
    "s.save_file({k: v.contiguous() for k, v in d.items()}, 'ae.safetensors')\""
)


def load_dictionary_learning(folder: Path, weights_path: Path) -> Weights:
    """Load the class of dictionary that ``trainer.dict_class`` of config.json names."""
    path = folder / "config.json"
    trainer = read_json_object(path, DictionaryError).get("trainer")
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    tensors = TensorFile(weights_path, DictionaryError)
    if name not in _READERS:
        raise DictionaryError(
            f"{path}: trainer.dict_class = {name!r}, but must be one of {', '.join(_READERS)}"
        )
    try:
        return _READERS[name](tensors)
    except KeyError as error:
        raise DictionaryError(f"{weights_path}: has no tensor {error}, which a {name} needs") from error


def _matrices(tensors: TensorFile) -> dict[str, Any]:
    """Linear layers store [out, in]; the newer classes store W_enc [D, F] and W_dec [F, D]."""
    if "W_enc" in tensors:
        return {"encoder": Matrix(tensors["W_enc"], features_last=True), "decoder": Matrix(tensors["W_dec"])}
    return {
        "encoder": Matrix(tensors["encoder.weight"]),
        "decoder": Matrix(tensors["decoder.weight"], features_last=True),
    }


def _standard(tensors: TensorFile) -> Weights:
    """The only class whose decoder rows are normalised on loading; its activations are scaled to match."""
    matrices = _matrices(tensors)
    norms = matrices["decoder"].norms()
    if not norms.all():
        raise DictionaryError(
            f"{tensors.path}: decoder.weight of feature {int(norms.argmin())} is all zeros, and an "
            "AutoEncoder is read with decoder rows of norm 1; remove the feature or train it"
        )
    bias = as_floats(tensors["bias"])
    return Weights(
        "relu",
        bias=as_floats(tensors["encoder.bias"]) * norms,
        centre=bias,
        decoder_bias=bias,
        encoder_scale=norms,
        decoder_scale=1 / norms,
        **matrices,
    )


def _standard_new(tensors: TensorFile) -> Weights:
    bias = as_floats(tensors["decoder.bias"])
    return Weights(
        "relu",
        bias=as_floats(tensors["encoder.bias"]),
        centre=np.zeros_like(bias),
        decoder_bias=bias,
        **_matrices(tensors),
    )


def _gated(tensors: TensorFile) -> Weights:
    ratio = np.exp(as_floats(tensors["r_mag"]))
    bias, centre = as_floats(tensors["mag_bias"]), as_floats(tensors["decoder_bias"])
    return Weights(
        "jumprelu",
        bias=bias,
        threshold=gated_threshold(ratio, bias, as_floats(tensors["gate_bias"])),
        centre=centre,
        decoder_bias=centre,
        encoder_scale=ratio,
        **_matrices(tensors),
    )


def _jumprelu(tensors: TensorFile) -> Weights:
    decoder_bias = as_floats(tensors["b_dec"])
    return Weights(
        "jumprelu",
        bias=as_floats(tensors["b_enc"]),
        threshold=np.maximum(as_floats(tensors["threshold"]), 0),
        centre=np.zeros_like(decoder_bias),
        decoder_bias=decoder_bias,
        **_matrices(tensors),
    )


def _topk(tensors: TensorFile) -> Weights:
    matrices = _matrices(tensors)
    decoder_bias, k = as_floats(tensors["b_dec"]), int(tensors["k"].reshape(-1)[0])
    if not 1 <= k <= matrices["encoder"].shape[0]:
        raise DictionaryError(f"{tensors.path}: k = {k}, but must be 1..{matrices['encoder'].shape[0]}")
    bias = as_floats(tensors["encoder.bias"])
    return Weights("topk", bias=bias, centre=decoder_bias, decoder_bias=decoder_bias, k=k, **matrices)


def _batch_topk(tensors: TensorFile) -> Weights:
    """Trained with BatchTopK, but encodes with one threshold for all features."""
    decoder_bias = as_floats(tensors["b_dec"])
    bias = as_floats(tensors["b_enc"] if "b_enc" in tensors else tensors["encoder.bias"])
    threshold = float(tensors["threshold"].reshape(-1)[0])
    if threshold < 0:
        raise DictionaryError(f"{tensors.path}: threshold = {threshold}: training ended before it was found")
    return Weights(
        "jumprelu",
        bias=bias,
        threshold=np.full_like(bias, threshold),
        centre=decoder_bias,
        decoder_bias=decoder_bias,
        **_matrices(tensors),
    )


_READERS = {
    "AutoEncoder": _standard,
    "AutoEncoderNew": _standard_new,
    "GatedAutoEncoder": _gated,
    "JumpReluAutoEncoder": _jumprelu,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batch_topk,
    "MatryoshkaBatchTopKSAE": _batch_topk,
}
