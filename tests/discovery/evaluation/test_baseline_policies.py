"""Baselines as policies: what they keep of the policy, what they change, and that the op does as they say."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from discovery.evaluation.baselines import baseline_policies, baselines
from discovery.evaluation.baselines.baseline_policies import Derived, derive_baselines
from discovery.evaluation.baselines.baselines import make_baselines
from discovery.evaluation.baselines.diffmean import diffmean
from discovery.evaluation.subject import Subject
from discovery.frozen_model import FrozenModel
from interpretops.artifacts.adapter import AdapterSite, write_adapter
from interpretops.artifacts.dictionary import (
    DictionaryManifest,
    ModelReference,
    WeightsReference,
    write_manifest,
)
from interpretops.artifacts.dictionary.manifest import sha256_of
from interpretops.compile import compile_policy
from interpretops.plan import Plan, Site
from interpretops.policy import load_policy
from interpretops.steering.hooked_model import HookedModel
from interpretops.steering.session import SteeringSession

WIDTH, FEATURES = 32, 48
EDITS: dict[str, dict[str, Any]] = {
    "vector": {
        "type": "steering_vector",
        "selector": {"layer": 2},
        "vector": {"file": "v.safetensors", "tensor": "v"},
        "strength": 3.0,
    },
    "ablation": {
        "type": "direction_ablation",
        "selector": {"layer": 2},
        "vector": {"file": "v.safetensors", "tensor": "v"},
    },
    "adapter": {"type": "lora_gate", "selector": {"block": "resid"}, "alpha": 1.0},
    "features": {
        "type": "feature_clamp",
        "selector": {"layer": 2, "sae_feature_ids": [3, 7]},
        "clamp_range": [5.0, 9.0],
    },
    "feature vector": {
        "type": "steering_vector",
        "selector": {"layer": 2},
        "vector": {"feature": 5},
        "strength": 2.0,
    },
}


@pytest.fixture
def bench(tiny: FrozenModel, tmp_path: Path) -> Path:
    """A folder with `policies/` (a vector and a probe in it) and `artifacts/` (a dictionary, an adapter)."""
    chance = np.random.default_rng(1)

    def drawn(*shape: int) -> np.ndarray:
        return chance.normal(size=shape).astype(np.float32)

    policies = tmp_path / "policies"
    policies.mkdir()
    save_file({"v": drawn(WIDTH), "probe": drawn(WIDTH)}, policies / "v.safetensors")
    folder = tmp_path / "artifacts" / tiny.spec.name / "l2"
    folder.mkdir(parents=True)
    weights = {
        "W_enc": drawn(WIDTH, FEATURES),
        "W_dec": drawn(FEATURES, WIDTH),
        "b_enc": drawn(FEATURES),
        "b_dec": drawn(WIDTH),
        "threshold": np.abs(drawn(FEATURES)),
    }
    save_file(weights, folder / "sae_weights.safetensors")
    settings = {"architecture": "jumprelu", "d_in": WIDTH, "d_sae": FEATURES, "apply_b_dec_to_input": True}
    (folder / "cfg.json").write_text(json.dumps(settings | {"normalize_activations": "none"}))
    reference = ModelReference(name=tiny.spec.name, fingerprint=tiny.spec.fingerprint)
    write_manifest(
        folder,
        DictionaryManifest(
            id="l2",
            layout="saelens",
            model=reference,
            layer=2,
            point="resid_post",
            width=FEATURES,
            hidden_size=WIDTH,
            activation="jumprelu",
            weights=WeightsReference(
                file="sae_weights.safetensors", sha256=sha256_of(folder / "sae_weights.safetensors")
            ),
        ),
    )
    adapter = tmp_path / "artifacts" / tiny.spec.name / "adapters" / "own"
    adapter.mkdir(parents=True)
    rows = AdapterSite(drawn(4, WIDTH), drawn(4, WIDTH), drawn(4), "relu", None)
    write_adapter(adapter, {Site(2, "resid_post"): rows}, target_class="jailbreak", model=tiny.spec)
    return tmp_path


Derive = Callable[..., tuple[Derived, dict[str, Plan]]]


@pytest.fixture
def derive(bench: Path, tiny: FrozenModel) -> Derive:
    """Writes a policy of one edit behind a gate, derives its baselines, and compiles all of them."""

    def make(edit: dict[str, Any], direction: Any = "not asked for") -> tuple[Derived, dict[str, Plan]]:
        gate = {
            "layer": 1,
            "scope": "prompt_end",
            "latched": True,
            "conditions": [{"probe": {"file": "v.safetensors", "tensor": "probe"}, "threshold": -1e6}],
        }
        policy = {
            "meta": {"id": "guard", "target_class": "jailbreak"},
            "gates": {"read": gate},
            "interventions": [{**edit, "gate": "read"}],
            "evaluation": {"success_criteria": {"defense_efficacy_min": 0.9}},
        }
        path = bench / "policies" / "guard.yaml"
        path.write_text(yaml.safe_dump(policy))
        loaded = load_policy(path)
        made = derive_baselines(
            loaded, tiny.spec, bench / "artifacts", bench / "out", seed=0, direction=direction
        )
        plans = {"here": compile_policy(loaded, model=tiny.spec, artifacts=bench / "artifacts")}
        for file in made.policies.glob("*.yaml"):
            plans[file.stem] = compile_policy(load_policy(file), model=tiny.spec, artifacts=made.artifacts)
        return made, plans

    return make


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_random_baseline_keeps_norms_gates_and_what_is_read(derive: Derive, edit: dict[str, Any]) -> None:
    """Every written row has another direction and its old norm; the rest stays, and so does the policy."""
    made, plans = derive(edit)
    assert made.ids["random_direction"] == "guard.random"
    assert plans["guard"].revision == plans["here"].revision
    old, new = (plans[name].edits[Site(2, "resid_post")].units for name in ("guard", "guard.random"))
    norms = [np.linalg.norm(units.write, axis=1) for units in (old, new)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    cosines = (old.write * new.write).sum(1) / (norms[0] * norms[1])
    assert np.abs(cosines).max() < 0.9
    if edit["type"] != "direction_ablation":  # which reads the direction that it removes
        assert np.array_equal(old.read, new.read)
    assert np.array_equal(old.gain, new.gain)
    assert len(plans["guard.random"].gates) == 2


def test_ungated_baseline_is_the_same_edit_without_its_gate(derive: Derive) -> None:
    """Same rows, no gate but the open one."""
    _, plans = derive(EDITS["adapter"])
    gated, open_ = plans["guard"], plans["guard.ungated"]
    assert len(open_.gates) == 1
    site = Site(2, "resid_post")
    assert np.array_equal(gated.edits[site].units.write, open_.edits[site].units.write)


def test_policy_without_a_condition_has_no_ungated_baseline(bench: Path, tiny: FrozenModel) -> None:
    """Nothing to take out is said, not served."""
    path = bench / "policies" / "plain.yaml"
    path.write_text(yaml.safe_dump({"meta": {"id": "plain"}, "interventions": [EDITS["vector"]]}))
    made = derive_baselines(
        load_policy(path), tiny.spec, bench / "artifacts", bench / "out", seed=0, direction="no contrast"
    )
    assert "ungated" not in made.ids
    assert made.notes["ungated"] == "the policy has no gate with a condition"
    assert made.notes["diffmean"] == "no contrast"


def test_full_disk_names_one_file(derive: Derive, monkeypatch: pytest.MonkeyPatch) -> None:
    """Artifacts that do not fit give one short reason, not a list of every file."""

    def full(source: str, target: str) -> str:
        raise OSError(28, "No space left on device", target)

    monkeypatch.setattr(baseline_policies, "_link", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '[^']*'$"):
        derive(EDITS["adapter"])


def test_op_moves_the_stream_as_far_but_elsewhere(derive: Derive, tiny_folder: Path) -> None:
    """Through the real op: the same tokens move as far but elsewhere; ungated, all of them move."""
    _, plans = derive(EDITS["vector"])
    model = HookedModel(tiny_folder, dtype="float32")
    ids, site = list(range(5, 17)), Site(2, "resid_post")
    plain = model.run_with_cache(ids, [site])[site]
    changes = {}
    for name in ("guard", "guard.random", "guard.ungated"):
        with SteeringSession(model, plans[name]):
            changes[name] = model.run_with_cache(ids, [site])[site] - plain
    norms = {name: change.norm(dim=-1) for name, change in changes.items()}
    assert norms["guard"][-1] > 0
    assert torch.allclose(norms["guard"], norms["guard.random"], atol=1e-3)
    cosine = torch.cosine_similarity(changes["guard"][-1], changes["guard.random"][-1], dim=0)
    assert abs(float(cosine)) < 0.9
    assert (norms["guard"][:-1] == 0).all()
    assert (norms["guard.ungated"] > 0).all()


def test_diffmean_is_the_difference_of_the_means(derive: Derive, tiny_folder: Path) -> None:
    """The served vector is mean minus mean of the last token's activation, whatever batches and padding."""
    towards = [f"Do the bad thing number {i}{'!' * i}" for i in range(11)]
    away = [f"A kind word, {i}" for i in range(9)]
    made, plans = derive(EDITS["adapter"], diffmean(tiny_folder, towards, away, "own"))
    units = plans["guard.diffmean"].edits[Site(2, "resid_post")].units
    model = HookedModel(tiny_folder, dtype="bfloat16")
    site = Site(2, "resid_post")
    means = [
        torch.stack([model.run_with_cache(text, [site], chat=True)[site][-1] for text in texts])
        .float()
        .mean(0)
        for texts in (towards, away)
    ]
    right = (means[0] - means[1]).numpy()
    assert np.linalg.norm(units.write[0] * units.offset[0] - right) < 0.05 * np.linalg.norm(right)
    assert "11 prompts less that of 9 (own)" in made.notes["diffmean"]
    assert len(plans["guard.diffmean"].gates) == 2


def test_baselines_are_made_once_and_say_what_is_missing(
    bench: Path, tiny: FrozenModel, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class that we bring no contrast for has no DiffMean; the same inputs derive nothing anew."""
    path = bench / "policies" / "plain.yaml"
    content = {"meta": {"id": "plain", "target_class": "unheard-of"}, "interventions": [EDITS["vector"]]}
    path.write_text(yaml.safe_dump(content))
    policy = load_policy(path)
    plan = compile_policy(policy, model=tiny.spec, artifacts=bench / "artifacts")
    subject = Subject(policy, plan.revision, tiny.spec, plan, tiny_folder)
    options: dict[str, Any] = {"contrast": None, "data_folder": None, "seed": 0}
    made = make_baselines(subject, bench / "artifacts", bench / "out", **options)
    assert made.ids == {"random_direction": "plain.random"}
    assert made.notes["diffmean"] == "no contrast of this class; give --contrast FILE"
    monkeypatch.setattr(baselines, "derive_baselines", None)
    again = make_baselines(subject, bench / "artifacts", bench / "out", **options)
    assert (again.ids, again.notes) == (made.ids, made.notes)
    with pytest.raises(TypeError):
        make_baselines(subject, bench / "artifacts", bench / "out", **{**options, "seed": 1})
