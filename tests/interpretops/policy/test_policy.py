"""The policy schema: what loads, what is refused, and how the refusal reads."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from interpretops.errors import PolicyError
from interpretops.policy import FeatureClamp, LoraGate, Policy, load_policy

EVERY_KIND = """\
meta: {id: everything, target_class: jailbreak}
constraints: {max_latency_overhead_pct: 20}
gates:
  harmful:
    layer: 2
    scope: prompt_end
    latched: true
    combine: all
    conditions:
      - {feature: 3, threshold: 1.5}
      - {probe: {file: v.safetensors, tensor: probe}, bias: 0.5, threshold: -1}
  answer: {phase: decode}
interventions:
  - {type: feature_scale, selector: {layer: 3, sae_feature_ids: [1, 2]}, scale: 0, gate: harmful}
  - {type: feature_clamp, selector: {layer: 3, sae_feature_ids: [4], dictionary: l3}, clamp_range: [0, 1]}
  - {type: steering_vector, selector: {layers: [3, 4]}, vector: {file: v.safetensors, tensor: v}, strength: 2}
  - {type: direction_ablation, selector: {layer: 1, point: mlp_out}, vector: {feature: 3, dictionary: l3}}
  - {type: head_scale, selector: {layer: 0, heads: [0, 2]}, scale: 0.5, gate: answer}
  - {type: lora_gate, selector: {block: resid}, alpha: 1, adapter: calm}
evaluation:
  suites: [{name: a}]
  success_criteria: {defense_efficacy_min: 0.5}
"""


def load(tmp_path: Path, text: str) -> Policy:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    return load_policy(path)


def lines(tmp_path: Path, text: str) -> list[str]:
    """Faults of a policy, the path of the file taken off."""
    with pytest.raises(PolicyError) as error:
        load(tmp_path, text)
    prefix = f"{tmp_path / 'policy.yaml'}: "
    assert all(line.startswith(prefix) for line in error.value.lines)
    return [line.removeprefix(prefix) for line in error.value.lines]


def one(intervention: str) -> str:
    return f"meta: {{id: x}}\ninterventions:\n  - {intervention}\n"


def test_reference_policy_loads_as_it_stands(repository: Path) -> None:
    """The policy that users write, comments included, loads with its values."""
    policy = load_policy(repository / "tests/fixtures/reference-policy.yaml")
    assert policy.meta.id == "jailbreak-v1"
    scale, clamp, lora = policy.interventions
    assert scale.type == "feature_scale"
    assert isinstance(clamp, FeatureClamp)
    assert clamp.clamp_range == (-0.5, 0.5)
    assert isinstance(lora, LoraGate)
    assert lora.selector.heads == (5, 9)
    assert [suite.name for suite in policy.evaluation.suites] == [
        "jailbreak_redteam_v1",
        "benign_regression_v1",
    ]
    assert policy.evaluation.success_criteria.collateral_damage_max == 0.05


def test_every_kind_and_gate_loads(tmp_path: Path) -> None:
    """All six kinds, conditional and phase-only gates load from one file."""
    policy = load(tmp_path, EVERY_KIND)
    assert [item.type for item in policy.interventions] == [
        "feature_scale",
        "feature_clamp",
        "steering_vector",
        "direction_ablation",
        "head_scale",
        "lora_gate",
    ]
    assert policy.gates["harmful"].latched
    assert policy.folder == tmp_path


def test_policy_is_frozen(tmp_path: Path) -> None:
    """Nothing changes after loading."""
    policy = load(tmp_path, EVERY_KIND)
    with pytest.raises(ValidationError):
        policy.meta.id = "other"  # type: ignore[misc]


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    """One run names every fault, each with path, value and line."""
    found = lines(
        tmp_path,
        """\
meta: {id: x, descripton: y}
interventions:
  - type: feature_scale
    selector: {layer: -1, sae_feature_ids: [1, 1]}
    scale: .nan
  - type: head_scale
    selector: {layer: 1, heads: [0, "x"]}
""",
    )
    assert found == [
        "meta.descripton is not a known key; did you mean 'description'? (line 1)",
        "interventions[0].selector.layer = -1, but must be greater than or equal to 0 (line 4)",
        "interventions[0].selector.sae_feature_ids names 1 twice (line 4)",
        "interventions[0].scale = nan, but must be a finite number (line 5)",
        "interventions[1].selector.heads[1] = 'x', but must be a valid integer (line 7)",
        "interventions[1].scale is missing (line 6)",
    ]


@pytest.mark.parametrize(
    ("intervention", "expected"),
    [
        (
            "{type: feature_clamp, selector: {layer: 1, sae_feature_ids: [1]}, clamp_range: [2, 1]}",
            "interventions[0].clamp_range = [2.0, 1.0] is inverted; write [1.0, 2.0] (line 3)",
        ),
        (
            "{type: feature_clamp, selector: {layer: 1, sae_feature_ids: [1]}, clamp_range: [0, .inf]}",
            "interventions[0].clamp_range[1] = inf, but must be a finite number (line 3)",
        ),
        (
            "{type: feature_scale, selector: {layer: 1, sae_feature_ids: []}, scale: 1}",
            "interventions[0].selector.sae_feature_ids has 0 entries, but must have at least 1 (line 3)",
        ),
        (
            "{type: feature_scale, selector: {layer: 1.0, sae_feature_ids: [1]}, scale: 1}",
            "interventions[0].selector.layer = 1.0, but must be a valid integer (line 3)",
        ),
        (
            "{type: feature_scale, selector: {layer: 1, sae_feature_ids: [1]}, scale: '1'}",
            "interventions[0].scale = '1', but must be a valid number (line 3)",
        ),
        (
            "{type: feature_scale, selector: {layer: 1, sae_feature_ids: [1]}, scale: true}",
            "interventions[0].scale = true, but must be a valid number (line 3)",
        ),
        (
            "{type: steering_vector, selector: {layer: 1}, vector: {file: ../v.safetensors}, strength: 1}",
            "interventions[0].vector.file must be a relative path without '..' (line 3)",
        ),
        (
            "{type: steering_vector, selector: {layer: 1}, vector: {file: /v.safetensors}, strength: 1}",
            "interventions[0].vector.file must be a relative path without '..' (line 3)",
        ),
        (
            "{type: steering_vector, selector: {layer: 1, layers: [2]}, vector: {feature: 1}, strength: 1}",
            "interventions[0].selector needs either 'layer' or 'layers' (line 3)",
        ),
        (
            "{type: head_scale, selector: {layer: 1, heads: [1]}, scale: 1, gate: oops}",
            "interventions[0].gate = 'oops', but the gates are always",
        ),
    ],
)
def test_a_fault_names_field_value_and_remedy(tmp_path: Path, intervention: str, expected: str) -> None:
    """Inverted ranges, infinities, wrong types, paths that lead out, unknown gates: each in one line."""
    assert lines(tmp_path, one(intervention)) == [expected]


def test_unknown_kind_lists_the_known_ones(tmp_path: Path) -> None:
    """A misspelt type is answered with the kinds there are."""
    (line,) = lines(tmp_path, one("{type: feature_scal}"))
    assert line.startswith("interventions[0].type = 'feature_scal', but must be one of 'feature_scale'")


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("{layer: 1, conditions: [{}]}", "needs one of 'feature', 'probe' and 'attention_probe'"),
        ("{conditions: [{feature: 1}]}", "has conditions but no 'layer'"),
        ("{latched: true}", "has no conditions"),
        ("{phase: decode, refusal: true}", "always open and cannot mean a refusal"),
        ("{layer: 1, conditions: [{feature: 1}], refusal_text: No}", "only a gate with 'refusal: true'"),
        ("{layer: 1, conditions: [{feature: 1}], refusal: true, refusal_text: ' '}", "refusal_text is blank"),
        ("{layer: 1, conditions: [{feature: 1, threshold: -1}]}", "threshold = -1.0, but a feature's"),
        ("{layer: 1, conditions: [{feature: 1, bias: 1}]}", "has a 'bias', which only a probe can have"),
        (
            "{layer: 1, scope: prompt, conditions: [{feature: 1}]}",
            "exactly one condition, an 'attention_probe'",
        ),
        ("{layer: 1, conditions: [{attention_probe: p}]}", "scope 'prompt' goes with exactly one condition"),
        ("{layer: 1, window: 8, conditions: [{feature: 1}]}", "window = 8, but scope 'token' reads single"),
        (
            "{layer: 1, scope: answer, latched: true, conditions: [{attention_probe: p}]}",
            "window = None, but scope 'answer' needs 1 to 256 tokens",
        ),
        (
            "{layer: 1, scope: answer, latched: true, window: 257, conditions: [{attention_probe: p}]}",
            "window = 257, but scope 'answer' needs 1 to 256 tokens",
        ),
        (
            "{layer: 1, scope: answer, window: 8, conditions: [{attention_probe: p}]}",
            "latched = false, but",
        ),
        (
            "{layer: 1, scope: answer, latched: true, window: 8, phase: prefill, "
            "conditions: [{attention_probe: p}]}",
            "opens after the prompt",
        ),
        (
            "{layer: 1, scope: answer, latched: true, window: 8, beside: h, "
            "conditions: [{attention_probe: p}]}",
            "needs both of 'beside' and 'prompt_weight'",
        ),
        (
            "{layer: 1, scope: answer, latched: true, window: 8, beside: h, prompt_weight: 1, "
            "conditions: [{attention_probe: p}]}",
            "gates.g.beside = 'h', but the gates of scope 'prompt' are: none",
        ),
        (
            "{layer: 1, scope: answer, latched: true, window: 8, refusal: true, "
            "conditions: [{attention_probe: p}]}",
            "refusal = true, but scope 'answer' opens when",
        ),
        ("{layer: 1, beside: h, conditions: [{feature: 1}]}", "which only scope 'answer' can have"),
        ("{layer: 1, scope: prompt, window: 0, conditions: [{attention_probe: p}]}", "gates.g.window = 0"),
        ("{layer: 1, scope: prompt, window: -4, conditions: [{attention_probe: p}]}", "gates.g.window = -4"),
        (
            "{layer: 1, scope: prompt, window: 2.5, conditions: [{attention_probe: p}]}",
            "gates.g.window = 2.5",
        ),
        ("{layer: 1, scope: prompt, window: true, conditions: [{attention_probe: p}]}", "gates.g.window = "),
    ],
)
def test_gates_that_cannot_work_are_refused(tmp_path: Path, gate: str, words: str) -> None:
    """A gate must say where and what it reads."""
    text = (
        one("{type: head_scale, selector: {layer: 1, heads: [0]}, scale: 1, gate: g}")
        + f"gates: {{g: {gate}}}"
    )
    assert any(words in line for line in lines(tmp_path, text))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ("", None),
        ("refusal: true", "I'm sorry, but I can't help with that."),
        ('refusal: true, refusal_text: "No."', "No."),
    ],
)
def test_gate_can_mean_a_refusal(tmp_path: Path, fields: str, text: str | None) -> None:
    """With `refusal: true` the plan gets the policy's text, or the default one; otherwise none."""
    gate = f"{{layer: 0, conditions: [{{feature: 1}}], {fields}}}"
    path = tmp_path / "p.yaml"
    path.write_text(
        one("{type: head_scale, selector: {layer: 1, heads: [0]}, scale: 1, gate: g}")
        + f"gates: {{g: {gate}}}"
    )
    assert load_policy(path).gates["g"].refusal_sentence == text


def test_unused_gate_and_reserved_names_are_refused(tmp_path: Path) -> None:
    """A gate that nothing names would silently guard nothing; `none` and `always` have a meaning already."""
    text = "meta: {id: none}\ngates: {always: {phase: decode}, g: {phase: decode}}\ninterventions:\n"
    text += "  - {type: head_scale, selector: {layer: 1, heads: [0]}, scale: 1}\n"
    found = " ".join(lines(tmp_path, text))
    assert "gates.g is used by no intervention" in found
    assert "meta.id = 'none'" in found
    assert "gates.always is built in" in found


def test_import_needs_no_torch() -> None:
    """Policies, plans, dictionaries, compiling and the command line load without torch."""
    import subprocess
    import sys

    code = (
        "import sys, mechctl.main, interpretops.compile, interpretops.model.spec, interpretops.settings\n"
        "heavy = {'torch', 'vllm', 'transformers', 'sae_lens'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
