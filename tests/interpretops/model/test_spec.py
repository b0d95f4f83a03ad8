"""Reading sizes and fingerprint from a model folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from interpretops.errors import ModelError
from interpretops.model.spec import read_model_spec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
}


def write(folder: Path, weights: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    tensors: dict[str, np.ndarray] = {"a": np.arange(600, dtype=np.float32), "b": np.ones(3, np.float16)}
    save_file(tensors | (weights or {}), folder / "model.safetensors")
    return folder


def test_default_model_is_read(default_model_dir: Path) -> None:
    """The default model has the sizes that the design names."""
    spec = read_model_spec(default_model_dir)
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads) == (576, 30, 9, 3)
    assert (spec.head_dim, spec.vocab_size, spec.architecture) == (64, 49152, "LlamaForCausalLM")
    assert spec.name == default_model_dir.name


@pytest.mark.parametrize(
    ("architecture", "config", "head_dim", "kv_heads"),
    [
        ("LlamaForCausalLM", {}, 8, 2),
        ("MistralForCausalLM", {"head_dim": 16}, 16, 2),
        ("Qwen2ForCausalLM", {"head_dim": None}, 8, 2),
        ("Qwen3ForCausalLM", {}, 128, 2),
        ("Gemma2ForCausalLM", {}, 256, 2),
        ("Gemma3ForCausalLM", {"head_dim": 64}, 64, 2),
        ("GPTNeoXForCausalLM", {"num_key_value_heads": None}, 8, 4),
    ],
)
def test_each_family_has_its_head_sizes(
    tmp_path: Path, architecture: str, config: dict[str, Any], head_dim: int, kv_heads: int
) -> None:
    """Head dimension and key-value heads are the family's own where the configuration is silent."""
    spec = read_model_spec(write(tmp_path / "m", architectures=[architecture], **config))
    assert (spec.head_dim, spec.num_kv_heads) == (head_dim, kv_heads)
    assert spec.width("attn_z") == 4 * head_dim
    assert spec.width("resid_post") == 32


@pytest.mark.parametrize("architecture", ["Gemma2Config", "Gemma3TextConfig", "Qwen3Config", "LlamaConfig"])
def test_head_dim_defaults_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    """Our defaults agree with the configuration classes of transformers."""
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, architecture)(hidden_size=32, num_attention_heads=4).head_dim
    ours = architecture.replace("Text", "").replace("Config", "ForCausalLM")
    assert read_model_spec(write(tmp_path / "m", architectures=[ours])).head_dim == theirs


def test_fingerprint_names_the_weights_and_not_the_place(tmp_path: Path) -> None:
    """A copy in another folder has the same fingerprint; other numbers, shapes or sizes have another."""
    spec = read_model_spec(write(tmp_path / "m"))
    assert read_model_spec(write(tmp_path / "copy")).fingerprint == spec.fingerprint
    changed = {"a": np.arange(600, dtype=np.float32) + 1}
    assert read_model_spec(write(tmp_path / "x", changed)).fingerprint != spec.fingerprint
    reshaped = {"a": np.arange(600, dtype=np.float32).reshape(2, 300)}
    assert read_model_spec(write(tmp_path / "y", reshaped)).fingerprint != spec.fingerprint
    assert read_model_spec(write(tmp_path / "z", num_attention_heads=8)).fingerprint != spec.fingerprint


def test_sharded_weights_have_the_fingerprint_of_the_whole(tmp_path: Path) -> None:
    """How the tensors are spread over files does not matter."""
    whole = read_model_spec(write(tmp_path / "m"))
    folder = write(tmp_path / "sharded")
    (folder / "model.safetensors").unlink()
    save_file({"b": np.ones(3, np.float16)}, folder / "model-00001-of-00002.safetensors")
    save_file({"a": np.arange(600, dtype=np.float32)}, folder / "model-00002-of-00002.safetensors")
    assert read_model_spec(folder).fingerprint == whole.fingerprint


def test_what_is_no_model_is_refused_by_name(tmp_path: Path) -> None:
    """A missing folder, an unknown architecture, missing sizes, missing or broken weights: one line each."""
    with pytest.raises(ModelError, match=r"config.json: cannot be read"):
        read_model_spec(tmp_path / "nothing")
    with pytest.raises(ModelError, match=r"architectures\[0\] = 'BertModel', but edit sites are known for"):
        read_model_spec(write(tmp_path / "bert", architectures=["BertModel"]))
    with pytest.raises(ModelError, match="hidden_size = 'big', but must be a positive integer"):
        read_model_spec(write(tmp_path / "size", hidden_size="big"))
    folder = write(tmp_path / "broken")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(ModelError, match="does not fit the file; it is damaged"):
        read_model_spec(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*.safetensors files"):
        read_model_spec(folder)
