"""Compiling: numbers mean what the policy says, bytes are the same twice, every fault has its place."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from interpretops.artifacts.adapter import AdapterSite, write_adapter
from interpretops.artifacts.dictionary import Dictionary, ModelReference, open_dictionary
from interpretops.compile import compile_policy
from interpretops.errors import PlanError, PolicyError
from interpretops.plan import ModelSpec, Plan, Site, read_plan
from interpretops.plan.check import check_plan
from interpretops.policy import load_policy
from interpretops.steering.plan_bank import PlanBank

R3, WIDTH = Site(3, "resid_post"), 24
MakeDictionary = Callable[..., Path]


@pytest.fixture
def compile_text(tmp_path: Path, model: ModelSpec, artifacts: Path) -> Callable[[str], Plan]:
    """Compiles the interventions (and gates) of a policy text."""

    def run(text: str) -> Plan:
        path = tmp_path / "policy.yaml"
        path.write_text(f"meta: {{id: p, target_class: jailbreak}}\n{text}")
        return compile_policy(load_policy(path), model=model, artifacts=artifacts)

    return run


def faults(compile_text: Callable[[str], Plan], text: str) -> list[str]:
    with pytest.raises(PolicyError) as error:
        compile_text(text)
    return [line.split("policy.yaml: ", 1)[1] for line in error.value.lines]


def apply(plan: Plan, site: Site, x: np.ndarray) -> np.ndarray:
    """[T, D] edited by the plan's formula in float64, all gates open."""
    units = plan.edits[site].units
    u = x @ units.read.T.astype(np.float64) + units.bias
    a = np.where(u > units.threshold, u, 0)
    g = units.gain * a + units.offset + (np.clip(a, units.low, units.high) - a)
    near = np.linalg.norm(x, axis=1)[:, None] <= units.max_norm
    return x + (near * g) @ units.write


def activations(width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(5).normal(size=(30, width))


def features(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    """[T, F] straight from the weights: jumprelu(W (x - b_dec) + b), in float64."""
    w = dictionary.weights
    u = (x - w.decoder_bias) @ w.encoder.array + w.bias
    return np.where(u > w.threshold, u, 0)


@pytest.mark.parametrize(
    ("edit", "change"),
    [
        ("type: feature_scale, scale: 0.35", lambda a: 0.35 * a),
        ("type: feature_scale, scale: -2", lambda a: -2 * a),
        ("type: feature_clamp, clamp_range: [0, 0.5]", lambda a: np.clip(a, 0, 0.5)),
        ("type: feature_clamp, clamp_range: [1, 2]", lambda a: np.clip(a, 1, 2)),
    ],
)
def test_feature_edit_is_encode_change_decode_in_delta_form(
    make_dictionary: MakeDictionary,
    compile_text: Callable[[str], Plan],
    edit: str,
    change: Callable[[np.ndarray], np.ndarray],
) -> None:
    """x' = x + (f(a) - a) W_dec over the named features; the reconstruction error stays."""
    dictionary = open_dictionary(make_dictionary())
    ids = [3, 17, 39]
    plan = compile_text(f"interventions:\n  - {{{edit}, selector: {{layer: 3, sae_feature_ids: {ids}}}}}")
    x = activations()
    a = features(dictionary, x)[:, ids]
    assert (a > 0).any(axis=0).all()
    expected = x + (change(a) - a) @ dictionary.weights.decoder.array[ids].astype(np.float64)
    np.testing.assert_allclose(apply(plan, R3, x), expected, rtol=1e-4, atol=1e-4)


def test_topk_feature_carries_the_whole_encoder(
    make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """A TopK dictionary's encoder is in the plan, and the units name their features in it."""
    config = {"architecture": "topk", "k": 5}
    dictionary = open_dictionary(make_dictionary(config=config, activation="topk"))
    plan = compile_text(
        "interventions:\n  - {type: feature_scale, scale: 0, selector: {layer: 3, sae_feature_ids: [4, 2]}}"
    )
    edits = plan.edits[R3]
    assert edits.topk is not None
    assert edits.topk.k == 5
    np.testing.assert_array_equal(edits.topk.read, dictionary.encoder_rows().read)
    np.testing.assert_array_equal(edits.units.topk, [4, 2])


def test_vectors_steer_and_ablate(tmp_path: Path, compile_text: Callable[[str], Plan]) -> None:
    """A steering vector adds strength times itself; an ablation takes the direction's share out."""
    v, w = np.random.default_rng(1).normal(size=(2, WIDTH)).astype(np.float32)
    save_file({"v": v, "w": w}, tmp_path / "vectors.safetensors")
    plan = compile_text(
        """interventions:
  - type: steering_vector
    selector: {layers: [1, 2]}
    vector: {file: vectors.safetensors, tensor: v}
    strength: -1.5
  - type: direction_ablation
    selector: {layer: 4, point: mlp_out}
    vector: {file: vectors.safetensors, tensor: w}
    max_norm: 100
"""
    )
    x = activations()
    for layer in (1, 2):
        np.testing.assert_allclose(apply(plan, Site(layer, "resid_post"), x), x - 1.5 * v, atol=1e-5)
    out = apply(plan, Site(4, "mlp_out"), x)
    np.testing.assert_allclose(out @ w, 0, atol=1e-4)
    far = apply(plan, Site(4, "mlp_out"), x * 1000)
    np.testing.assert_array_equal(far, x * 1000)
    assert set(plan.provenance["vectors"]) == {"vectors.safetensors"}


def test_decoder_row_can_be_the_vector(
    make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """A feature of a dictionary serves as direction, with the dictionary's norm bound at its site."""
    dictionary = open_dictionary(make_dictionary(max_norm=500.0))
    plan = compile_text(
        "interventions:\n"
        "  - {type: steering_vector, selector: {layer: 3}, vector: {feature: 7}, strength: 2}\n"
    )
    np.testing.assert_array_equal(plan.edits[R3].units.write, dictionary.decoder_rows([7]))
    assert plan.edits[R3].units.max_norm.tolist() == [500.0]


DIRECTIONS = """gates:
  on:
    layer: 3
    conditions: [{probe: {file: v.safetensors}, threshold: 0.5}]
interventions:
  - {type: steering_vector, selector: {layer: 3}, vector: {file: v.safetensors}, strength: 1, gate: on}
  - {type: direction_ablation, selector: {layer: 3}, vector: {file: v.safetensors}}
  - {type: lora_gate, selector: {block: resid}, alpha: 1}
"""


def bounds_in(plan: Plan) -> set[float]:
    return {*plan.edits[R3].units.max_norm.tolist(), *(gate.max_norm for gate in plan.gates[1:])}


@pytest.fixture
def directions(tmp_path: Path, artifacts: Path, model: ModelSpec) -> str:
    """A policy whose every edit and gate would take a norm bound from somewhere."""
    save_file({"v": np.ones(WIDTH, np.float32)}, tmp_path / "v.safetensors")
    adapter(artifacts, model, "calm", R3)
    return DIRECTIONS


def write_bounds(artifacts: Path, spec: ModelSpec, folder: str = "tiny", **values: Any) -> Path:
    record = {"kind": "norm_bounds", "model": {"name": spec.name, "fingerprint": spec.fingerprint}}
    path = artifacts / folder / "norm-bounds.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record | {"bounds": {"3.resid_post": 800.0}} | values))
    return path


def test_unrelated_dictionary_changes_nothing(
    directions: str, make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """What lies beside what a policy names, at the same site and with a tighter bound, leaves every byte."""
    alone = compile_text(directions)
    assert bounds_in(alone) == {float("inf")}
    make_dictionary("other", max_norm=5.0)
    make_dictionary("another", max_norm=7.0, layer=4)
    assert compile_text(directions).to_bytes() == alone.to_bytes()


def test_dictionary_that_a_policy_uses_bounds_its_directions_there(
    directions: str, make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """Wherever in the policy it is named; others at the site do not count, tighter or not."""
    make_dictionary("used", max_norm=500.0)
    make_dictionary("other", max_norm=5.0)
    scale = (
        "  - {type: feature_scale, selector: {layer: 3, sae_feature_ids: [1], dictionary: used}, scale: 0}\n"
    )
    assert bounds_in(compile_text(directions + scale)) == {500.0}


def test_model_s_own_record_bounds_directions(
    directions: str,
    artifacts: Path,
    model: ModelSpec,
    make_dictionary: MakeDictionary,
    compile_text: Callable[[str], Plan],
) -> None:
    """norm-bounds.yaml is found by its fingerprint; one of another model is not this one's."""
    write_bounds(artifacts, model, "elsewhere")
    write_bounds(artifacts, model, "foreign", model={"name": "x", "fingerprint": "cd" * 32}, bounds={})
    recorded = compile_text(directions)
    assert bounds_in(recorded) == {800.0}
    make_dictionary("other", max_norm=5.0)
    assert compile_text(directions).to_bytes() == recorded.to_bytes()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"bounds": {"3.middle": 1.0}},
            r"norm-bounds.yaml: bounds\.? ?site = '3.middle', but must be <layer>",
        ),
        (
            {"bounds": {"3.resid_post": 0}},
            r"norm-bounds.yaml: bounds\.3\.resid_post = 0, but must be greater",
        ),
        ({"boundz": {}}, "boundz is not a known key; did you mean 'bounds'"),
    ],
)
def test_record_of_bounds_that_cannot_be_read_is_refused(
    directions: str,
    artifacts: Path,
    model: ModelSpec,
    compile_text: Callable[[str], Plan],
    values: dict[str, Any],
    words: str,
) -> None:
    """A bound that were passed over would let sinks be edited."""
    write_bounds(artifacts, model, **values)
    with pytest.raises(PolicyError, match=words):
        compile_text(directions)


def test_two_records_of_bounds_are_refused(
    directions: str, artifacts: Path, model: ModelSpec, compile_text: Callable[[str], Plan]
) -> None:
    """Neither is more the model's own than the other."""
    write_bounds(artifacts, model)
    write_bounds(artifacts, model, "elsewhere")
    with pytest.raises(PolicyError, match=r"tiny has several records of norm bounds: .*; keep one"):
        compile_text(directions)


def test_vector_file_of_a_name_that_lies_in_two_folders_is_refused(
    tmp_path: Path,
    artifacts: Path,
    model: ModelSpec,
    make_dictionary: MakeDictionary,
    compile_text: Callable[[str], Plan],
) -> None:
    """Which of two different files is meant must not hang on the names of folders; equal ones are one."""
    edit = "type: steering_vector, selector: {layer: 3}, vector: {file: w.safetensors}, strength: 1"
    text = f"interventions:\n  - {{{edit}}}"
    save_file({"w": np.ones(WIDTH, np.float32)}, artifacts / "w.safetensors")
    make_dictionary("other").rename(artifacts / "tiny" / "moved")
    copy = artifacts / "copy-of-tiny"
    shutil.copytree(artifacts / "tiny", copy)
    for folder in (artifacts / "tiny", copy):
        shutil.copy(artifacts / "w.safetensors", folder)
    first = compile_text(text)
    save_file({"w": 2 * np.ones(WIDTH, np.float32)}, copy / "w.safetensors")
    assert "different files have this name" in faults(compile_text, text)[0]
    shutil.copy(copy / "w.safetensors", tmp_path)  # the policy's own folder comes first
    own = compile_text(text).edits[R3].units.write
    np.testing.assert_array_equal(own, 2 * first.edits[R3].units.write)


def test_head_scale_touches_the_named_heads_only(compile_text: Callable[[str], Plan]) -> None:
    """The scale minus one stands on the heads' slices, zero elsewhere."""
    plan = compile_text(
        "interventions:\n  - {type: head_scale, selector: {layer: 0, heads: [0, 2]}, scale: 0.25}"
    )
    scale = plan.edits[Site(0, "attn_z")].head_scale
    assert scale is not None
    np.testing.assert_allclose(scale.delta.reshape(3, 8)[:, 0], [-0.75, 0, -0.75])
    assert len(plan.edits[Site(0, "attn_z")].units) == 0


def adapter(artifacts: Path, model: ModelSpec, name: str, site: Site) -> AdapterSite:
    rng = np.random.default_rng(2)
    width = model.width(site.point)
    read, write = rng.normal(size=(2, 4, width)).astype(np.float32)
    part = AdapterSite(read, write, np.ones(4, np.float32), "relu")
    write_adapter(
        artifacts / model.name / "adapters" / name, {site: part}, target_class="jailbreak", model=model
    )
    return part


def test_adapter_of_the_target_class_is_found_and_scaled(
    artifacts: Path, model: ModelSpec, compile_text: Callable[[str], Plan]
) -> None:
    """Without `adapter`, the artifacts' one for the class acts: x + alpha * B relu(A x + bias)."""
    part = adapter(artifacts, model, "calm", R3)
    plan = compile_text("interventions:\n  - {type: lora_gate, selector: {block: resid}, alpha: 0.5}")
    x = activations()
    expected = x + 0.5 * np.maximum(x @ part.read.T.astype(np.float64) + part.bias, 0) @ part.write
    np.testing.assert_allclose(apply(plan, R3, x), expected, rtol=1e-4, atol=1e-4)
    assert list(plan.provenance["adapters"]) == ["calm"]


def test_adapter_reads_the_named_heads_only(
    artifacts: Path, model: ModelSpec, compile_text: Callable[[str], Plan]
) -> None:
    """Heads mask A's columns."""
    part = adapter(artifacts, model, "calm", Site(1, "attn_z"))
    plan = compile_text(
        "interventions:\n  - {type: lora_gate, selector: {block: attn, heads: [1]}, alpha: 1}"
    )
    read = plan.edits[Site(1, "attn_z")].units.read.reshape(4, 3, 8)
    np.testing.assert_array_equal(read[:, 1], part.read.reshape(4, 3, 8)[:, 1])
    assert not read[:, [0, 2]].any()


def _probe_policy(more: str = "", gate: str = "") -> str:
    return f"""
gates:
  g: {{layer: 2, scope: prompt, latched: true, {gate}
       conditions: [{{attention_probe: p.safetensors, {more}}}]}}
interventions:
  - {{type: head_scale, selector: {{layer: 3, heads: [0]}}, scale: 0, gate: g}}
"""


def _probe_numbers(*layers: int, heads: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {"query": (heads, WIDTH), "read": (heads, WIDTH), "bias": (heads,), "max_norm": (1,)}
    return {
        f"{layer}.{name}": 1 + rng.random(shape).astype(np.float32)
        for layer in layers
        for name, shape in shapes.items()
    }


def test_gate_of_the_whole_prompt_carries_its_probe(
    compile_text: Callable[[str], Plan], tmp_path: Path
) -> None:
    """The plan holds the probe's numbers by layer, one cut, and comes back from its file the same."""
    numbers = _probe_numbers(1, 2)
    save_file(numbers, tmp_path / "p.safetensors")
    plan = compile_text(_probe_policy("bias: 0.5, threshold: 2"))
    gate = read_plan(plan.to_bytes()).gates[1]
    assert (gate.scope, gate.latched, gate.cut.tolist()) == ("prompt", True, [1.5])
    assert [part.site.layer for part in gate.probe] == [1, 2]
    for part in gate.probe:
        for name in ("query", "read", "bias"):
            np.testing.assert_array_equal(getattr(part, name), numbers[f"{part.site.layer}.{name}"])
        assert part.max_norm == pytest.approx(float(numbers[f"{part.site.layer}.max_norm"][0]))
    bank = PlanBank(plan.model, plan.edits, rows=4)
    bank.load(plan)
    assert bank.digest(plan.revision) == plan.digest()
    assert {site.layer for site in bank.active_sites} == {1, 2, 3}
    save_file(numbers | {"1.query": -numbers["1.query"]}, tmp_path / "p.safetensors")
    assert compile_text(_probe_policy("bias: 0.5, threshold: 2")).digest() != plan.digest()


def test_window_is_part_of_the_plan_and_of_what_is_attested(
    compile_text: Callable[[str], Plan], tmp_path: Path
) -> None:
    """The window comes back from the file, changes the digest, and the bank attests it; without one the file
    says nothing about windows, so that plans keep their revisions."""
    save_file(_probe_numbers(1, 2), tmp_path / "p.safetensors")
    whole, *windowed = (compile_text(_probe_policy(gate=gate)) for gate in ("", "window: 64,", "window: 65,"))
    assert b"window" not in whole.to_bytes()
    assert whole.gates[1].window is None
    assert [read_plan(plan.to_bytes()).gates[1].window for plan in windowed] == [64, 65]
    assert len({plan.digest() for plan in (whole, *windowed)}) == 3
    bank = PlanBank(whole.model, whole.edits, rows=4)
    for plan in (whole, *windowed):
        bank.load(plan)
        assert bank.digest(plan.revision) == plan.digest()


@pytest.mark.parametrize("window", [0, -1, 2_000_000, True, 1.5])
def test_plan_with_a_senseless_window_is_refused(
    compile_text: Callable[[str], Plan], tmp_path: Path, window: Any
) -> None:
    """A plan file's window must be a whole number of tokens, of a gate that has a probe."""
    save_file(_probe_numbers(1, 2), tmp_path / "p.safetensors")
    plan = compile_text(_probe_policy())
    broken = replace(plan, gates=(plan.gates[0], replace(plan.gates[1], window=window)))
    if window is True:  # as float32 it is written as 1
        with pytest.raises(PlanError, match="window = True"):
            check_plan(broken)
        return
    with pytest.raises(PlanError, match=r"gates\[?\.?1\]?\.window = "):
        read_plan(broken.to_bytes())


@pytest.mark.parametrize(
    ("change", "metadata", "words"),
    [
        ({"2.query": None}, {}, "2.query is missing"),
        ({"1.read": np.ones((3, WIDTH + 1), np.float32)}, {}, "1.read is [3, 25], but must be"),
        ({"2.bias": np.full(3, np.nan, np.float32)}, {}, "2.bias is [3], but must be"),
        ({"probe": np.ones(3, np.float32)}, {}, "the file holds 'probe'"),
        ({}, {"model_fingerprint": "cd" * 32}, "of fingerprint cdcdcdcdcdcd; tiny has abababababab"),
    ],
)
def test_probe_that_does_not_fit_is_refused(
    compile_text: Callable[[str], Plan],
    tmp_path: Path,
    change: dict[str, np.ndarray | None],
    metadata: dict[str, str],
    words: str,
) -> None:
    """A missing tensor, a wrong width, a number that is none, another model: the field and the reason."""
    numbers = {**_probe_numbers(1, 2), **change}
    kept = {name: array for name, array in numbers.items() if array is not None}
    save_file(kept, tmp_path / "p.safetensors", metadata)
    with pytest.raises(PolicyError, match=re.escape(words)) as error:
        compile_text(_probe_policy())
    assert "gates.g.conditions[0].attention_probe" in str(error.value)


def test_probe_of_another_layer_is_refused(compile_text: Callable[[str], Plan], tmp_path: Path) -> None:
    """The gate decides where its probe does."""
    save_file(_probe_numbers(1, 3), tmp_path / "p.safetensors")
    with pytest.raises(PolicyError, match=r"gates.g.layer = 2, but the attention probe decides at layer 3"):
        compile_text(_probe_policy())


def test_more_heads_than_are_kept_are_refused(compile_text: Callable[[str], Plan], tmp_path: Path) -> None:
    """A plan whose probes need more numbers a token than are kept does not load."""
    save_file(_probe_numbers(1, 2, heads=65), tmp_path / "p.safetensors")
    plan = compile_text(_probe_policy())
    with pytest.raises(PlanError, match="probes of 130 heads together, but at most 128 are kept"):
        PlanBank(plan.model, plan.edits, rows=4).load(plan)


def test_gate_reads_features_and_probes(
    tmp_path: Path, make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """A feature condition on its activation becomes one on its reading, above its own threshold at least."""
    dictionary = open_dictionary(make_dictionary(max_norm=700.0))
    probe = np.arange(WIDTH, dtype=np.float32)
    save_file({"probe": probe}, tmp_path / "p.safetensors")
    plan = compile_text(
        """gates:
  g:
    layer: 3
    combine: all
    scope: prompt_end
    latched: true
    phase: decode
    conditions:
      - {feature: 5, threshold: 2.5}
      - {feature: 6}
      - {probe: {file: p.safetensors}, bias: 0.5, threshold: -1}
  later: {phase: decode}
interventions:
  - {type: feature_scale, scale: 0, selector: {layer: 3, sae_feature_ids: [1]}, gate: g}
  - {type: head_scale, scale: 0, selector: {layer: 0, heads: [1]}, gate: later}
"""
    )
    gate = plan.gates[1]
    rows = dictionary.encoder_rows([5, 6])
    np.testing.assert_array_equal(gate.read, np.stack([*rows.read, probe]))
    np.testing.assert_allclose(gate.bias, [*rows.bias, 0.5])
    np.testing.assert_allclose(gate.cut, [2.5, rows.threshold[1], -1])
    assert (gate.site, gate.combine, gate.scope, gate.latched, gate.phase) == (
        R3,
        "all",
        "prompt_end",
        True,
        "decode",
    )
    assert gate.max_norm == 700.0
    assert (plan.gates[2].site, plan.gates[2].phase) == (None, "decode")
    assert plan.edits[R3].units.gate.tolist() == [1]


def test_compiling_twice_gives_the_same_bytes(
    make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """Same inputs, same revision; another number, another revision; a comment changes nothing."""
    make_dictionary()
    text = "interventions:\n  - {type: feature_scale, scale: %s, selector: {layer: 3, sae_feature_ids: [4]}}"
    first = compile_text(text % "0.5")
    assert compile_text(text % "0.5").to_bytes() == first.to_bytes()
    assert compile_text("# a comment\n" + text % "0.5").revision == first.revision
    assert compile_text(text % "0.25").revision != first.revision


def test_plan_needs_the_dictionary_no_more(
    make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """The plan's bytes are complete: they read back after the dictionary is gone."""
    folder = make_dictionary()
    plan = compile_text(
        "interventions:\n  - {type: feature_scale, scale: 0, selector: {layer: 3, sae_feature_ids: [4]}}"
    )
    record = plan.provenance["dictionaries"]["l3"]
    assert record["sha256"] == open_dictionary(folder).manifest.weights.sha256
    (folder / "sae_weights.safetensors").unlink()
    assert read_plan(plan.to_bytes()).revision == plan.revision


def test_reference_policy_is_told_exactly_what_a_nine_head_model_lacks(
    repository: Path, tmp_path: Path
) -> None:
    """Both layers without dictionary, head 9, no adapter: each in a line of its own, with its place."""
    nine = ModelSpec("smollm2-135m-instruct", "cd" * 32, "LlamaForCausalLM", 576, 30, 9, 3, 64, 49152)
    file = repository / "tests/fixtures/reference-policy.yaml"
    with pytest.raises(PolicyError) as error:
        compile_policy(load_policy(file), model=nine, artifacts=tmp_path)
    found = [line.removeprefix(f"{file}: ") for line in error.value.lines]
    remedy = f"{tmp_path} has none of this model; train one with `mechctl sae-train`"
    assert found == [
        "interventions[0].selector.layer = 12, but smollm2-135m-instruct has no dictionary at 12.resid_post; "
        f"{remedy} (line 13)",
        "interventions[1].selector.layer = 8, but smollm2-135m-instruct has no dictionary at 8.resid_post; "
        f"{remedy} (line 18)",
        "interventions[2].selector.heads[1] = 9, but smollm2-135m-instruct has heads 0..8 (line 24)",
        f"interventions[2] names no 'adapter', and {tmp_path} has no adapter for target class 'jailbreak' of "
        "smollm2-135m-instruct; there is none at all (line 21)",
    ]


SCALE_AT = """\
interventions:
  - {type: feature_scale, scale: 0, selector: {layer: %d, sae_feature_ids: [%s]}}"""
STEER = "interventions:\n  - {type: steering_vector, selector: {layer: 1}, vector: {file: %s}, strength: 1}"
SCALE = "{type: feature_scale, scale: 0, selector: {layer: 3, sae_feature_ids: [1], dictionary: %s}}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            SCALE_AT % (3, "39, 40"),
            "interventions[0].selector.sae_feature_ids[1] = 40, but dictionary l3 has features 0..39",
        ),
        (
            SCALE_AT % (6, "1"),
            "interventions[0].selector.layer = 6, but tiny has layers 0..5 (line 3)",
        ),
        (
            SCALE_AT % (2, "1"),
            "interventions[0].selector.layer = 2, but tiny has no dictionary at 2.resid_post; "
            "there is l3 at 3.resid_post (line 3)",
        ),
        (
            "interventions:\n  - " + SCALE % "nope",
            "interventions[0].selector.dictionary = 'nope', but there is no such dictionary; "
            "there is l3 at 3.resid_post (line 3)",
        ),
        (
            "interventions:\n  - " + SCALE % "foreign",
            "interventions[0].selector.dictionary = 'foreign', but it is a dictionary of other "
            "(fingerprint efefefefefef), and the model is tiny (fingerprint abababababab) (line 3)",
        ),
        (
            "interventions:\n  - {type: head_scale, scale: 0, selector: {layers: [0, 9], heads: [1]}}",
            "interventions[0].selector.layers[1] = 9, but tiny has layers 0..5 (line 3)",
        ),
        (
            STEER % "no.st",
            "interventions[0].vector.file = 'no.st', but there is no such file in ",
        ),
        (
            "gates: {g: {layer: 3, conditions: [{feature: 99}]}}\n"
            "interventions:\n  - {type: head_scale, scale: 0, selector: {layer: 4, heads: [1]}, gate: g}",
            "gates.g.conditions[0].feature = 99, but dictionary l3 has features 0..39 (line 2)",
        ),
        (
            "gates: {g: {layer: 3, conditions: [{feature: 9}]}}\n"
            "interventions:\n  - {type: head_scale, scale: 0, selector: {layer: 2, heads: [1]}, gate: g}",
            "interventions[0].gate = 'g', but it reads at 3.resid_post, after the edit at 2.attn_z has acted",
        ),
        (
            "interventions:\n"
            "  - {type: feature_scale, scale: 0, selector: {layer: 3, sae_feature_ids: [1]}}\n"
            "  - {type: feature_clamp, clamp_range: [0, 1], selector: {layer: 3, sae_feature_ids: [2, 1]}}",
            "interventions[1].selector.sae_feature_ids[1] = 1, but "
            "interventions[0].selector.sae_feature_ids[0] already edits the same target; "
            "merge the two (line 4)",
        ),
        (
            "interventions:\n  - {type: lora_gate, selector: {block: attn}, alpha: 1, adapter: calm}",
            "interventions[0].adapter = 'calm', but ",
        ),
    ],
)
def test_what_the_model_or_artifacts_lack_is_named(
    make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan], text: str, expected: str
) -> None:
    """Ids, layers, dictionaries, files, gates, adapters that do not fit: field, value, remedy."""
    make_dictionary()
    make_dictionary("foreign", model=ModelReference(name="other", fingerprint="ef" * 32))
    (line,) = faults(compile_text, text)
    assert line.startswith(expected)


def test_several_dictionaries_at_a_site_must_be_named(
    make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """Two candidates are no choice."""
    make_dictionary()
    make_dictionary("wide")
    (line,) = faults(compile_text, "interventions:\n  - " + SCALE.replace(", dictionary: %s", ""))
    assert "tiny has several dictionaries at 3.resid_post: l3, wide; name one" in line
    assert compile_text("interventions:\n  - " + SCALE % "wide").provenance["dictionaries"].keys() == {"wide"}


def test_feature_of_a_topk_dictionary_cannot_gate(
    make_dictionary: MakeDictionary, compile_text: Callable[[str], Plan]
) -> None:
    """A gate reads rows; being among the k largest is not a row."""
    make_dictionary(config={"architecture": "topk", "k": 5}, activation="topk")
    text = "gates: {g: {layer: 3, conditions: [{feature: 1}]}}\n"
    text += "interventions:\n  - {type: head_scale, scale: 0, selector: {layer: 4, heads: [1]}, gate: g}"
    (line,) = faults(compile_text, text)
    assert line.startswith("gates.g.conditions[0].feature = 1, but l3 is a TopK dictionary")


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"v": np.ones(7, np.float32)}, None, "tensor 'v' has shape [7], and the activation has 24 numbers"),
        ({"v": np.zeros(WIDTH, np.float32)}, None, "must be finite and not all zeros"),
        ({"v": np.full(WIDTH, np.nan, np.float32)}, None, "must be finite and not all zeros"),
        ({"v": np.ones(WIDTH, np.float32), "w": np.ones(3)}, None, "the file holds v, w; name one of them"),
        (
            {"v": np.ones(WIDTH, np.float32)},
            {"model_fingerprint": "ef" * 32},
            "it was made from a model of fingerprint efefefefefef; tiny has abababababab",
        ),
    ],
)
def test_vector_that_does_not_fit_is_refused(
    tmp_path: Path, compile_text: Callable[[str], Plan], tensors: Any, metadata: Any, words: str
) -> None:
    """Wrong width, zeros, NaN, an unnamed tensor, another model's vector."""
    save_file(tensors, tmp_path / "v.safetensors", metadata)
    (line,) = faults(compile_text, STEER % "v.safetensors")
    assert words in line


def test_vector_file_cannot_be_reached_through_a_link_out(
    tmp_path: Path, compile_text: Callable[[str], Plan]
) -> None:
    """A symbolic link that leads out of the policy's folder is not followed."""
    outside = tmp_path.parent / f"{tmp_path.name}-outside.safetensors"
    save_file({"v": np.ones(WIDTH, np.float32)}, outside)
    (tmp_path / "v.safetensors").symlink_to(outside)
    (line,) = faults(compile_text, STEER % "v.safetensors")
    assert "it points outside" in line
