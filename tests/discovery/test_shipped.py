"""What ships with the repository: policies compile against the shipped artifacts, records are complete."""

import json
from pathlib import Path

import pytest
import yaml

from discovery.data.sources import Source, read_prompts, sha256_of_file
from interpretops.artifacts import Artifacts
from interpretops.artifacts.adapter import open_adapter
from interpretops.artifacts.dictionary.load import open_dictionary
from interpretops.artifacts.dictionary.manifest import read_adapter_manifest
from interpretops.circuit import load_circuit
from interpretops.compile import compile_policy
from interpretops.plan import ModelSpec
from interpretops.policy import load_policy

ROOT = Path(__file__).resolve().parents[2]
MODEL = "smollm2-135m-instruct"
ADAPTER = ROOT / "sae_artifacts" / MODEL / "adapters" / "jailbreak-refusal"
POLICIES = sorted((ROOT / "policies").glob("*.yaml"))
MAX_DICTIONARY_BYTES = 12 * 2**20


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """The default model, as the shipped artifacts name it."""
    fingerprint = read_adapter_manifest(ADAPTER).model.fingerprint
    return ModelSpec(MODEL, fingerprint, "LlamaForCausalLM", 576, 30, 9, 3, 64, 49152)


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_shipped_policy_compiles(path: Path, spec: ModelSpec) -> None:
    """Every shipped policy compiles for the default model, and has a file of examples that names it."""
    policy = load_policy(path)
    plan = compile_policy(policy, model=spec, artifacts=ROOT / "sae_artifacts")
    assert sum(len(edits.units) for edits in plan.edits.values()) > 0
    examples = yaml.safe_load((ROOT / "policies" / "examples" / path.name).read_text())
    assert examples["policy"] == policy.meta.id


def test_jailbreak_edits_nothing_before_its_gate_opens(spec: ModelSpec) -> None:
    """Every edit of the shipped policy stands behind the one gate that reads the whole prompt."""
    path = ROOT / "policies" / "jailbreak.yaml"
    plan = compile_policy(load_policy(path), model=spec, artifacts=ROOT / "sae_artifacts")
    named = {int(gate) for edits in plan.edits.values() for gate in edits.units.gate}
    assert len(named) == 1
    gate = plan.gates[named.pop()]
    assert (gate.scope, gate.latched, gate.phase) == ("prompt", True, "both")


def test_shipped_adapter_was_made_from_permitted_data() -> None:
    """The adapter opens, its record names data and licences, and nothing non-commercial was trained on."""
    open_adapter(ADAPTER)
    record = json.loads((ADAPTER / "run.json").read_text())
    groups = {name: entries for name, entries in record["data"].items() if not name.startswith("test_")}
    licences = {entry["licence"] for entries in groups.values() for entry in entries}
    assert licences
    assert not any("NC" in licence for licence in licences)
    assert "not stated" not in licences


def test_shipped_dictionaries_are_sound(spec: ModelSpec) -> None:
    """Every shipped dictionary opens, is small enough, and carries its metrics and its norm bound."""
    found = Artifacts(ROOT / "sae_artifacts", spec).all_dictionaries
    assert found
    for folder, manifest in found.items():
        open_dictionary(folder)
        assert manifest.model.fingerprint == spec.fingerprint
        assert (folder / manifest.weights.file).stat().st_size <= MAX_DICTIONARY_BYTES
        assert manifest.max_norm is not None
        metrics = manifest.metrics
        assert None not in (metrics.delta_ce, metrics.fvu, metrics.l0, metrics.dead_share)
        assert not any("NC" in name for name in manifest.training.data)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "sae_artifacts" / MODEL / "circuits").glob("*.json")), ids=lambda path: path.stem
)
def test_shipped_circuit_is_of_the_default_model(path: Path, spec: ModelSpec) -> None:
    """A shipped circuit was found in the default model and its shipped dictionaries, and was compared."""
    circuit = load_circuit(path)
    assert circuit.fingerprint == spec.fingerprint
    shipped = Artifacts(ROOT / "sae_artifacts", spec).all_dictionaries
    hashes = {
        manifest.id: sha256_of_file(folder / manifest.weights.file) for folder, manifest in shipped.items()
    }
    for dictionary in circuit.dictionaries:
        assert hashes[dictionary.id] == dictionary.weights_sha256
    assert circuit.stability is not None
    assert circuit.stability.circuits >= 5
    for measured in circuit.faithfulness:
        assert measured.random is not None
        assert measured.random.count >= 20
        assert measured.cpr > measured.random.cpr_best


def test_examples_were_not_trained_on() -> None:
    """No example prompt of a shipped policy is among our own training prompts."""
    prompts = ROOT / "discovery" / "prompts"
    trained = {
        prompt.casefold()
        for name in ("harmful", "benign")
        for prompt in read_prompts(Source(prompts / "contrast.yaml", "prompts", name=name))
    } | {prompt.casefold() for prompt in read_prompts(Source(prompts / "self-asked.json", "prompts"))}
    for path in (prompts / "written").rglob("*.yaml"):
        for name in ("harmful", "borderline", "benign") if path.stem != "wrappers" else ():
            if name in yaml.safe_load(path.read_text()):
                trained |= {prompt.casefold() for prompt in read_prompts(Source(path, "prompts", name=name))}
    requests = yaml.safe_load((prompts / "requests.yaml").read_text())
    said = [text.casefold() for name, texts in requests.items() if "_" in name for text in texts]
    for path in (ROOT / "policies" / "examples").glob("*.yaml"):
        for value in yaml.safe_load(path.read_text()).values():
            if isinstance(value, list):
                shown = {str(prompt).casefold() for prompt in value if isinstance(prompt, str)}
                assert not trained & shown
                assert not [text for text in said if any(text in prompt for prompt in shown)]
