"""Small models, dictionaries and adapters on disk, for the tests of the library."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from interpretops.artifacts.dictionary import (
    DictionaryManifest,
    ModelReference,
    WeightsReference,
    write_manifest,
)
from interpretops.plan import ModelSpec

WIDTH, FEATURES = 24, 40


@pytest.fixture
def model() -> ModelSpec:
    """A model of 6 layers, 3 heads of 8."""
    return ModelSpec("tiny", "ab" * 32, "LlamaForCausalLM", WIDTH, 6, 3, 1, 8, 100)


@pytest.fixture
def manifest_for(model: ModelSpec) -> Callable[..., DictionaryManifest]:
    """Write the manifest of the weights in a folder."""

    def write(folder: Path, file: str, **values: Any) -> DictionaryManifest:
        record: dict[str, Any] = {
            "id": folder.name,
            "layout": "saelens",
            "model": ModelReference(name=model.name, fingerprint=model.fingerprint),
            "layer": 3,
            "point": "resid_post",
            "width": FEATURES,
            "hidden_size": WIDTH,
            "activation": "jumprelu",
            "weights": WeightsReference(
                file=file, sha256=hashlib.sha256((folder / file).read_bytes()).hexdigest()
            ),
        }
        manifest = DictionaryManifest(**(record | values))
        write_manifest(folder, manifest)
        return manifest

    return write


@pytest.fixture
def saelens_weights() -> dict[str, np.ndarray]:
    """Weights of a JumpReLU SAE whose features are often active on standard normal activations."""
    rng = np.random.default_rng(7)
    return {
        "W_enc": rng.normal(size=(WIDTH, FEATURES)).astype(np.float32),
        "W_dec": rng.normal(size=(FEATURES, WIDTH)).astype(np.float32),
        "b_enc": rng.normal(size=FEATURES).astype(np.float32),
        "b_dec": rng.normal(size=WIDTH).astype(np.float32),
        "threshold": rng.uniform(0.1, 1.0, size=FEATURES).astype(np.float32),
    }


@pytest.fixture
def make_dictionary(
    tmp_path: Path,
    model: ModelSpec,
    saelens_weights: dict[str, np.ndarray],
    manifest_for: Callable[..., DictionaryManifest],
) -> Callable[..., Path]:
    """Write a SAELens folder with manifest under ``artifacts/<model>/<id>``; returns the folder."""

    def make(
        name: str = "l3", *, config: dict[str, Any] | None = None, drop: tuple[str, ...] = (), **values: Any
    ) -> Path:
        folder = tmp_path / "artifacts" / model.name / name
        folder.mkdir(parents=True)
        weights = {key: value for key, value in saelens_weights.items() if key not in drop}
        save_file(weights, folder / "sae_weights.safetensors")
        settings = {
            "architecture": "jumprelu",
            "d_in": WIDTH,
            "d_sae": FEATURES,
            "apply_b_dec_to_input": True,
        }
        settings |= {"normalize_activations": "none"} | (config or {})
        (folder / "cfg.json").write_text(json.dumps(settings))
        manifest_for(folder, "sae_weights.safetensors", **values)
        return folder

    return make


@pytest.fixture
def artifacts(tmp_path: Path) -> Path:
    """The artifacts folder that `make_dictionary` fills."""
    (tmp_path / "artifacts").mkdir(exist_ok=True)
    return tmp_path / "artifacts"
