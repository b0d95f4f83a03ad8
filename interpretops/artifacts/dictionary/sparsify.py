"""The EleutherAI sparsify layout: cfg.json and sae.safetensors, a TopK encoder."""

from pathlib import Path
from typing import Any

import numpy as np

from interpretops.artifacts.dictionary.saelens import CONFIG_NAME
from interpretops.artifacts.dictionary.weights import Matrix, Weights, as_floats
from interpretops.errors import DictionaryError
from interpretops.files.json_file import read_json_object
from interpretops.files.tensor_file import TensorFile

WEIGHTS_NAME = "sae.safetensors"


def load_sparsify(folder: Path, weights_path: Path) -> Weights:
    """encoder.weight [F, D], encoder.bias [F], W_dec [F, D], b_dec [D]: topk(relu(W (x - b_dec) + bias))."""
    path = folder / CONFIG_NAME
    config = read_json_object(path, DictionaryError)
    tensors = TensorFile(weights_path, DictionaryError)
    _refuse_variants(path, config, tensors)
    encoder = Matrix(_tensor(tensors, "encoder.weight"))
    decoder_bias = as_floats(_tensor(tensors, "b_dec"))
    k = config.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= encoder.shape[0]:
        raise DictionaryError(f"{path}: k = {k!r}, but must be 1..{encoder.shape[0]}")
    return Weights(
        "topk",
        encoder=encoder,
        decoder=Matrix(_tensor(tensors, "W_dec")),
        bias=as_floats(_tensor(tensors, "encoder.bias")),
        centre=decoder_bias,
        decoder_bias=decoder_bias,
        k=k,
    )


def _refuse_variants(path: Path, config: dict[str, Any], tensors: TensorFile) -> None:
    if config.get("activation", "topk") != "topk":
        raise DictionaryError(f"{path}: activation = {config['activation']!r}, but only 'topk' is supported")
    for flag in ("signed", "transcode", "skip_connection"):
        if config.get(flag):
            raise DictionaryError(f"{path}: {flag} = true, which is not supported")
    if "W_skip" in tensors and np.any(tensors["W_skip"]):
        raise DictionaryError(f"{tensors.path}: has a W_skip: a transcoder, not a dictionary")


def _tensor(tensors: TensorFile, name: str) -> Any:
    if name not in tensors:
        raise DictionaryError(
            f"{tensors.path}: has no tensor {name!r}; it holds {', '.join(sorted(tensors))}"
        )
    return tensors[name]
