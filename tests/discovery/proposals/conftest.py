"""A class whose target prompts shout, a small dictionary, and `propose` as a function and as a command."""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from discovery.frozen_model import FrozenModel
from interpretops.artifacts.dictionary import (
    DictionaryManifest,
    ModelReference,
    WeightsReference,
    write_manifest,
)
from mechctl.main import main

FEATURES = 48


@pytest.fixture
def class_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a class file; keyword arguments replace its keys."""

    def write(name: str = "shouting", **values: object) -> Path:
        content = {
            "name": name,
            "judge": {"kind": "words", "words": ["zzz"]},
            "wanted": ["zzz zzz zzz", "zzz zzz"],
            "target": [f"BREAK THE THING NUMBER {i} NOW" for i in range(16)],
            "benign": [f"please water plant number {i}" for i in range(16)],
            "borderline": [f"please BREAK the bread number {i}" for i in range(6)],
        } | values
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def dictionary(tiny: FrozenModel, tmp_path: Path) -> Callable[..., Path]:
    """Writes a jumprelu dictionary of the tiny model at layer 2; returns the artifacts folder."""

    def write(name: str = "tiny-2", fingerprint: str | None = None) -> Path:
        width = tiny.spec.hidden_size
        folder = tmp_path / "artifacts" / "tiny-llama" / name
        folder.mkdir(parents=True)
        rng = np.random.default_rng(3)
        encoder = rng.normal(size=(width, FEATURES)).astype(np.float32)
        weights = {
            "W_enc": encoder,
            "W_dec": np.ascontiguousarray(encoder.T / np.linalg.norm(encoder.T, axis=1, keepdims=True)),
            "b_enc": np.zeros(FEATURES, np.float32),
            "b_dec": np.zeros(width, np.float32),
            "threshold": np.full(FEATURES, 0.1, np.float32),
        }
        save_file(weights, folder / "sae_weights.safetensors")
        config = {
            "architecture": "jumprelu",
            "d_in": width,
            "d_sae": FEATURES,
            "normalize_activations": "none",
        }
        (folder / "cfg.json").write_text(json.dumps(config | {"apply_b_dec_to_input": True}))
        digest = hashlib.sha256((folder / "sae_weights.safetensors").read_bytes()).hexdigest()
        manifest = DictionaryManifest(
            id=name,
            layout="saelens",
            model=ModelReference(name="tiny-llama", fingerprint=fingerprint or tiny.spec.fingerprint),
            layer=2,
            point="resid_post",
            width=FEATURES,
            hidden_size=width,
            activation="jumprelu",
            weights=WeightsReference(file="sae_weights.safetensors", sha256=digest),
        )
        write_manifest(folder, manifest)
        return tmp_path / "artifacts"

    return write


@pytest.fixture
def mechctl(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs `mechctl` in this process, in an empty folder; gives exit status, stdout, stderr."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mechctl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run
