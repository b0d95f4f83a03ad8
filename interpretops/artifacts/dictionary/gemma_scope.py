"""The Gemma Scope layouts, all JumpReLU: params.npz (first release), params.safetensors (second)."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from interpretops.artifacts.dictionary.weights import Matrix, Weights, as_floats
from interpretops.errors import DictionaryError
from interpretops.files.tensor_file import TensorFile

WEIGHTS_NAMES = ("params.npz", "params.safetensors")


def load_gemma_scope(folder: Path, weights_path: Path) -> Weights:
    """W_enc [D, F], W_dec [F, D], b_enc, b_dec, threshold. b_dec is not subtracted from the input."""
    del folder
    tensors = {name.lower(): array for name, array in _read(weights_path).items()}
    missing = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"} - set(tensors)
    if missing:
        raise DictionaryError(f"{weights_path}: has no array {', '.join(sorted(missing))}")
    if "affine_skip_connection" in tensors:
        raise DictionaryError(f"{weights_path}: is a transcoder with a skip connection, not a dictionary")
    if "scaling_factor" in tensors and not np.allclose(tensors["scaling_factor"], 1):
        raise DictionaryError(f"{weights_path}: scaling_factor differs from 1, which is not supported")
    decoder_bias = as_floats(tensors["b_dec"])
    return Weights(
        "jumprelu",
        encoder=Matrix(tensors["w_enc"], features_last=True),
        decoder=Matrix(tensors["w_dec"]),
        bias=as_floats(tensors["b_enc"]),
        centre=np.zeros_like(decoder_bias),
        decoder_bias=decoder_bias,
        threshold=np.maximum(as_floats(tensors["threshold"]), 0),
    )


def _read(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        return TensorFile(path, DictionaryError)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DictionaryError(f"{path}: cannot be read as an archive of plain arrays ({error})") from error
