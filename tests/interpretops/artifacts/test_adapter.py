"""Adapters in PEFT's layout: what comes back, and what cannot be an edit."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from interpretops.artifacts.adapter import AdapterSite, open_adapter, write_adapter
from interpretops.artifacts.dictionary import ModelReference, WeightsReference, write_manifest
from interpretops.artifacts.dictionary.manifest import AdapterManifest
from interpretops.errors import AdapterError
from interpretops.plan import ModelSpec, Site

RESID, HEADS = Site(3, "resid_post"), Site(1, "attn_z")


def parts(rank: int = 4, width: int = 24) -> AdapterSite:
    rng = np.random.default_rng(rank)
    read, write = rng.normal(size=(2, rank, width)).astype(np.float32)
    return AdapterSite(read, write, rng.normal(size=rank).astype(np.float32), "relu", 900.0)


def write(folder: Path, model: ModelSpec) -> Path:
    write_adapter(folder, {RESID: parts(), HEADS: parts(2)}, target_class="jailbreak", model=model)
    return folder


def rewrite(folder: Path, model: ModelSpec, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Change parts of an adapter's configuration and weights; the manifest follows."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights) | tensors, weights)
    write_manifest(
        folder,
        AdapterManifest(
            id=folder.name,
            target_class="jailbreak",
            model=ModelReference(name=model.name, fingerprint=model.fingerprint),
            weights=WeightsReference(
                file=weights.name, sha256=hashlib.sha256(weights.read_bytes()).hexdigest()
            ),
        ),
    )


def test_written_adapter_comes_back_whole(tmp_path: Path, model: ModelSpec) -> None:
    """Rows, biases, activation and norm bound survive; the configuration is one PEFT can parse."""
    adapter = open_adapter(write(tmp_path / "calm", model))
    assert adapter.manifest.target_class == "jailbreak"
    assert list(adapter.sites) == [HEADS, RESID]
    for site, expected in ((RESID, parts()), (HEADS, parts(2))):
        found = adapter.sites[site]
        np.testing.assert_array_equal(found.read, expected.read)
        np.testing.assert_allclose(found.write, expected.write, rtol=1e-6)
        np.testing.assert_array_equal(found.bias, expected.bias)
        assert (found.activation, found.max_norm, found.threshold) == ("relu", 900.0, 0.0)


@pytest.mark.parametrize(
    ("config", "factor"), [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 8, "use_rslora": True}, 4.0)]
)
def test_scaling_of_peft_is_folded(
    tmp_path: Path, model: ModelSpec, config: dict[str, Any], factor: float
) -> None:
    """lora_alpha / r, or / sqrt(r), multiplies B."""
    folder = tmp_path / "calm"
    write_adapter(folder, {RESID: parts()}, target_class="jailbreak", model=model)
    rewrite(folder, model, config, {})
    np.testing.assert_allclose(open_adapter(folder).sites[RESID].write, parts().write * factor, rtol=1e-6)


def test_saved_by_peft_for_a_module_is_refused_by_name(tmp_path: Path, model: ModelSpec) -> None:
    """A LoRA of anything but the attention output projection is no edit; the message names its modules."""
    folder = write(tmp_path / "calm", model)
    rewrite(folder, model, {"interpretops": None, "target_modules": ["q_proj", "v_proj"]}, {})
    with pytest.raises(
        AdapterError, match=r"target_modules = \['q_proj', 'v_proj'\], but only the attention's output"
    ):
        open_adapter(folder)


@pytest.mark.parametrize(
    ("config", "tensors", "words"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type = 'IA3', but must be 'LORA'"),
        ({"use_dora": True}, {}, "use_dora = True, which is not supported"),
        ({"r": 0}, {}, "r = 0, but must be a positive integer"),
        ({"lora_alpha": None}, {}, "lora_alpha = None, but must be a number"),
        ({"interpretops": {"sites": {"3.mid": {}}}}, {}, "interpretops.sites: site = '3.mid'"),
        (
            {"interpretops": {"sites": {"3.resid_post": {"activation": "gelu"}}}},
            {},
            "activation = 'gelu', but must be identity or relu",
        ),
        ({}, {"other": np.ones(3, np.float32)}, "tensor 'other' belongs to none"),
        (
            {},
            {"base_model.model.model.layers.3.resid_post.lora_A.bias": np.ones(9, np.float32)},
            r"site 3.resid_post has A \(4, 24\), B \(24, 4\), bias \(9,\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, model: ModelSpec, config: dict[str, Any], tensors: dict[str, np.ndarray], words: str
) -> None:
    """Other kinds, strange options, tensors of no site, shapes that do not match: one line each."""
    folder = write(tmp_path / "calm", model)
    rewrite(folder, model, config, tensors)
    with pytest.raises(AdapterError, match=words):
        open_adapter(folder)


@pytest.mark.slow
def test_configuration_is_valid_to_peft(tmp_path: Path, model: ModelSpec) -> None:
    """PEFT's own class reads the configuration that we write."""
    peft = pytest.importorskip("peft")
    write(tmp_path / "calm", model)
    config = json.loads((tmp_path / "calm" / "adapter_config.json").read_text())
    config.pop("interpretops")
    (tmp_path / "calm" / "adapter_config.json").write_text(json.dumps(config))
    read = peft.PeftConfig.from_pretrained(str(tmp_path / "calm"))
    assert (read.r, read.lora_alpha, set(read.target_modules)) == (4, 4, {"resid_post", "attn_z"})
