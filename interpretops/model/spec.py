"""Reads what a plan must know about a model: sizes from config.json, identity from the weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

from interpretops.errors import ModelError
from interpretops.files.json_file import read_json_object
from interpretops.files.tensor_file import TensorFile
from interpretops.model.family import FAMILIES
from interpretops.plan import ModelSpec

SAMPLE_BYTES = 256

_HEAD_DIM_DEFAULTS = {"Qwen3ForCausalLM": 128, "Gemma2ForCausalLM": 256, "Gemma3ForCausalLM": 256}
"""Families whose head size is not hidden_size / num_attention_heads by default."""


def read_model_spec(folder: Path) -> ModelSpec:
    """Sizes and fingerprint of the model in a Hugging Face folder. The model's name is the folder's name.

    The fingerprint is a sha256 over architecture and sizes and, for every tensor of the folder's
    ``*.safetensors`` in name order, its name, dtype, shape and first 256 bytes. Only these bytes are read,
    so it takes milliseconds. Raises `ModelError`.
    """
    folder = Path(folder).resolve()
    config = read_json_object(folder / "config.json", ModelError)
    architecture = _architecture(folder / "config.json", config)

    def size(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{folder / 'config.json'}: {key} = {value!r}, but must be a positive integer")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    sizes = {
        "hidden_size": hidden,
        "num_layers": size("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": heads if architecture == "GPTNeoXForCausalLM" else size("num_key_value_heads", heads),
        "head_dim": size("head_dim", _HEAD_DIM_DEFAULTS.get(architecture, hidden // heads)),
        "vocab_size": size("vocab_size"),
    }
    fingerprint = _fingerprint(folder, architecture, sizes)
    return ModelSpec(name=folder.name, fingerprint=fingerprint, architecture=architecture, **sizes)


def _architecture(path: Path, config: dict[str, Any]) -> str:
    named = config.get("architectures") or [None]
    if named[0] not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{path}: architectures[0] = {named[0]!r}, but edit sites are known for {known}")
    return str(named[0])


def _fingerprint(folder: Path, architecture: str, sizes: dict[str, int]) -> str:
    files = [TensorFile(path, ModelError) for path in sorted(folder.glob("*.safetensors"))]
    if not files:
        raise ModelError(f"{folder}: no *.safetensors files; convert the weights, no other format is loaded")
    digest = hashlib.sha256()
    digest.update(json.dumps([architecture, sizes], sort_keys=True).encode())
    owners = {name: file for file in files for name in file}
    for name in sorted(owners):
        entry = owners[name].entries[name]
        digest.update(json.dumps([name, entry.dtype, entry.shape]).encode())
        digest.update(owners[name].head(name, SAMPLE_BYTES))
    return digest.hexdigest()
