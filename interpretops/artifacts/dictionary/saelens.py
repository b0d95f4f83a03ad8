"""The SAELens layout (v6, and older files as v6 reads them): cfg.json and sae_weights.safetensors."""

from pathlib import Path
from typing import Any

import numpy as np

from interpretops.artifacts.dictionary.weights import Matrix, Weights, as_floats
from interpretops.errors import DictionaryError
from interpretops.files.json_file import object_in, read_json_object
from interpretops.files.tensor_file import TensorFile

WEIGHTS_NAME = "sae_weights.safetensors"
CONFIG_NAME = "cfg.json"
SCALER_NAME = "activation_scaler.json"


def load_saelens(folder: Path, weights_path: Path) -> Weights:
    """Load architecture standard, topk, jumprelu or gated. SAELens saves BatchTopK as jumprelu."""
    path = folder / CONFIG_NAME
    config = read_json_object(path, DictionaryError)
    tensors = TensorFile(weights_path, DictionaryError)
    architecture = _architecture(config)
    _refuse_unfoldable(path, config, tensors)
    encoder = Matrix(_tensor(tensors, "W_enc"), features_last=True)
    decoder = Matrix(_tensor(tensors, "W_dec"))
    decoder_bias = as_floats(_tensor(tensors, "b_dec"))
    subtract = bool(config.get("apply_b_dec_to_input", True))
    parts: dict[str, Any] = {
        "encoder": encoder,
        "decoder": decoder,
        "decoder_bias": decoder_bias,
        "centre": decoder_bias if subtract else np.zeros_like(decoder_bias),
        "input_scale": _input_scale(folder, config),
    }
    if architecture == "standard":
        return Weights("relu", bias=as_floats(_tensor(tensors, "b_enc")), **parts)
    if architecture == "jumprelu":
        threshold = np.maximum(as_floats(_tensor(tensors, "threshold")), 0)
        return Weights("jumprelu", bias=as_floats(_tensor(tensors, "b_enc")), threshold=threshold, **parts)
    if architecture == "gated":
        ratio = np.exp(as_floats(_tensor(tensors, "r_mag")))
        bias = as_floats(_tensor(tensors, "b_mag"))
        return Weights(
            "jumprelu",
            bias=bias,
            threshold=gated_threshold(ratio, bias, as_floats(_tensor(tensors, "b_gate"))),
            encoder_scale=ratio,
            **parts,
        )
    if architecture == "topk":
        bias = as_floats(_tensor(tensors, "b_enc"))
        k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= encoder.shape[0]:
            raise DictionaryError(f"{path}: k = {k!r}, but must be 1..{encoder.shape[0]}")
        if config.get("rescale_acts_by_decoder_norm"):
            norms = decoder.norms()
            parts |= {"encoder_scale": norms, "decoder_scale": 1 / norms}
            bias = bias * norms
        return Weights("topk", bias=bias, k=k, **parts)
    raise DictionaryError(
        f"{path}: architecture = {architecture!r}, but must be one of standard, topk, jumprelu, gated"
    )


def gated_threshold(ratio: Any, magnitude_bias: Any, gate_bias: Any) -> Any:
    """A gated encoder's jumprelu threshold: u = ratio*p + magnitude_bias; p + gate_bias > 0 iff u > this."""
    return np.maximum(magnitude_bias - ratio * gate_bias, 0)


def _architecture(config: dict[str, Any]) -> str:
    name = str(config.get("architecture", "standard"))
    function = config.get("activation_fn", config.get("activation_fn_str"))
    return "topk" if name == "standard" and function == "topk" else name


def _refuse_unfoldable(path: Path, config: dict[str, Any], tensors: TensorFile) -> None:
    normalisation = config.get("normalize_activations") or "none"
    if normalisation is not True and normalisation not in ("none", "expected_average_only_in"):
        raise DictionaryError(
            f"{path}: normalize_activations = {normalisation!r}, but this normalisation depends on the "
            "token, and an edit's rows are fixed; only 'none' and 'expected_average_only_in' can be folded"
        )
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if function not in ("relu", "topk", None):
        raise DictionaryError(f"{path}: activation_fn = {function!r}, but must be relu or topk")
    if config.get("finetuning_scaling_factor") or "finetuning_scaling_factor" in tensors:
        raise DictionaryError(f"{path}: finetuning_scaling_factor is not supported; fold it into W_dec")
    for place in (config, object_in(config, "metadata")):
        if place.get("hook_name_out") not in (None, place.get("hook_name")):
            raise DictionaryError(
                f"{path}: hook_name_out differs from hook_name: this is a transcoder, not a dictionary"
            )
    if config.get("d_out") not in (None, config.get("d_in")):
        raise DictionaryError(f"{path}: d_out differs from d_in: this is a transcoder, not a dictionary")


def _input_scale(folder: Path, config: dict[str, Any]) -> float:
    normalisation = config.get("normalize_activations")
    if normalisation is not True and normalisation != "expected_average_only_in":
        return 1.0
    path = folder / SCALER_NAME
    if not path.exists():
        raise DictionaryError(
            f"{folder / CONFIG_NAME}: normalize_activations = 'expected_average_only_in', but there is no "
            f"{SCALER_NAME} beside it with the factor; save the SAE with the factor folded into its weights"
        )
    factor = read_json_object(path, DictionaryError).get("scaling_factor")
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not 0 < factor < float("inf"):
        raise DictionaryError(f"{path}: scaling_factor = {factor!r}, but must be a positive number")
    return float(factor)


def _tensor(tensors: TensorFile, name: str) -> Any:
    if name not in tensors:
        raise DictionaryError(
            f"{tensors.path}: has no tensor {name!r}; it holds {', '.join(sorted(tensors))}"
        )
    return tensors[name]
