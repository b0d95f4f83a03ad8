"""Prompts to try a policy with, where the command names none."""

from pathlib import Path

import pytest

from interpretops.errors import PolicyError
from interpretops.policy.examples import ANY, example_prompts

POLICIES = Path(__file__).resolve().parents[3] / "policies"


@pytest.mark.parametrize("name", ["jailbreak", "jailbreak-sae", "toxicity"])
def test_every_shipped_policy_has_examples(name: str) -> None:
    """Two prompts that it acts on and two that it leaves alone, none of the known failures."""
    found = example_prompts(POLICIES / f"{name}.yaml")
    assert len(set(found)) == 4
    assert not set(found) & set(ANY)


def test_failures_are_no_examples(tmp_path: Path) -> None:
    """What a policy misses, or reaches too far, does not show what it is for."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "calm.yaml").write_text(
        "policy: calm\nmissed: [m]\noverreached: [o]\nstopped: [a, b, c]\nleft_alone: [x, y, z]\n"
    )
    assert example_prompts(tmp_path / "calm.yaml") == ("a", "b", "x", "y")


def test_policy_without_examples_is_tried_with_ours(tmp_path: Path) -> None:
    """A new policy can be tried at once; a plan (.safetensors) finds the examples of its policy's name."""
    assert example_prompts(tmp_path / "calm.yaml") == ANY
    assert example_prompts(POLICIES / "jailbreak.safetensors") == example_prompts(POLICIES / "jailbreak.yaml")


def test_examples_that_are_no_lists_are_refused(tmp_path: Path) -> None:
    """The line names the file and the form."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "calm.yaml").write_text("- a\n")
    with pytest.raises(PolicyError, match=r"calm\.yaml: must map names to lists of prompts"):
        example_prompts(tmp_path / "calm.yaml")
