"""`mechctl policy`: what it prints, where errors go, and that the documentation is the schema's."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from interpretops.plan import read_plan
from interpretops.policy.reference import policy_reference


def mechctl(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line as its own process."""
    command = [sys.executable, "-m", "mechctl.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_valid_policy_is_named_on_stdout(repository: Path) -> None:
    """Validation needs no model and says what it found."""
    done = mechctl("policy", "validate", repository / "tests/fixtures/reference-policy.yaml")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("reference-policy.yaml: jailbreak-v1 is valid, 3 interventions\n")


def test_faults_of_all_files_are_lines_on_stderr_without_traceback(tmp_path: Path) -> None:
    """Every fault of every file is one line; the exit status is 2."""
    (tmp_path / "a.yaml").write_text("meta: {id: a}\ninterventions: []\n")
    (tmp_path / "b.yaml").write_text("meta: {id: a, x: 1}\n")
    done = mechctl("policy", "validate", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"{tmp_path}/a.yaml: interventions has 0 entries, but must have at least 1 (line 2)",
        f"{tmp_path}/b.yaml: meta.x is not a known key; "
        "known are description, id, origin, target_class (line 1)",
        f"{tmp_path}/b.yaml: interventions is missing",
    ]


def test_json_schema_covers_every_kind_of_intervention() -> None:
    """Editors get a JSON Schema in which each kind of intervention appears, with descriptions."""
    schema = json.loads(mechctl("policy", "schema").stdout)
    kinds = schema["properties"]["interventions"]["items"]["discriminator"]["mapping"]
    assert set(kinds) == {
        "feature_scale",
        "feature_clamp",
        "steering_vector",
        "direction_ablation",
        "head_scale",
        "lora_gate",
    }
    for name, definition in schema["$defs"].items():
        for key, field in definition["properties"].items():
            assert field.get("description") or "$ref" in field, f"{name}.{key} says nothing"


def test_reference_page_matches_the_schema(repository: Path) -> None:
    """docs/policy-reference.md is what `mechctl policy reference` prints; run it when the schema changes."""
    assert (repository / "docs/policy-reference.md").read_text() == policy_reference()
    assert mechctl("policy", "reference").stdout == policy_reference()


@pytest.mark.parametrize("command", ["validate", "compile", "schema", "reference"])
def test_help_explains_every_command(command: str) -> None:
    """Every command explains itself."""
    done = mechctl("policy", command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 5


def test_compile_writes_the_plan_under_its_revision(
    tmp_path: Path, make_dictionary: Callable[..., Path]
) -> None:
    """The summary goes to stdout, the plan to the folder, named by its sha256; a misfit is named by field."""
    import numpy as np
    from safetensors.numpy import save_file

    from interpretops.artifacts.dictionary import ModelReference
    from interpretops.model.spec import read_model_spec

    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "hidden_size": 24, "num_hidden_layers": 6}
    config |= {"num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": np.ones(4, np.float32)}, folder / "model.safetensors")
    spec = read_model_spec(folder)
    make_dictionary(model=ModelReference(name="tiny", fingerprint=spec.fingerprint))
    policy = tmp_path / "p.yaml"
    policy.write_text(
        "meta: {id: p}\ngates: {answer: {phase: decode}}\ninterventions:\n"
        "  - {type: feature_scale, scale: 0, selector: {layer: 3, sae_feature_ids: [1, 5]}, gate: answer}\n"
    )
    options = ("--model", folder, "--artifacts", tmp_path / "artifacts")
    done = mechctl("policy", "compile", policy, *options, "-o", tmp_path / "plans")
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "plans").iterdir()
    plan = read_plan(path.read_bytes())
    assert path.name == f"{plan.revision}.safetensors"
    assert done.stdout.splitlines()[-1] == str(path)
    for word in ("3.resid_post", plan.revision, "decode", "l3"):
        assert word in done.stdout
    config_file = tmp_path / "config.yaml"
    config_file.write_text("paths: {plans: by-setting}\n")
    done = mechctl("policy", "compile", policy, *options, "--config", config_file)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "by-setting" / path.name)
    policy.write_text(policy.read_text().replace("[1, 5]", "[1, 99]"))
    done = mechctl("policy", "compile", policy, *options)
    assert done.returncode == 2
    assert done.stderr == (
        f"{policy}: interventions[0].selector.sae_feature_ids[1] = 99, but dictionary l3 has features 0..39 "
        "(line 4)\n"
    )
