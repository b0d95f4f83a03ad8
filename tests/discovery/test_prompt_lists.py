"""The prompts that ship for training: readable, without repeats, and on one side each."""

from pathlib import Path

import pytest

from discovery.errors import DiscoveryError
from interpretops.files.strict_yaml import read_yaml

LANGUAGES = Path(__file__).resolve().parents[2] / "discovery" / "prompts" / "written" / "languages"
LEAST = {"benign": 60, "borderline": 20, "harmful": 20}


@pytest.mark.parametrize("path", sorted(LANGUAGES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_language_has_prompts_of_each_side(path: Path) -> None:
    """A language has enough ordinary, borderline and harmful prompts, and no prompt twice."""
    lists = read_yaml(path, DiscoveryError).data
    assert {name: len(prompts) >= LEAST[name] for name, prompts in lists.items()} == dict.fromkeys(
        LEAST, True
    )
    prompts = [prompt for listed in lists.values() for prompt in listed]
    assert all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
    assert len({prompt.strip().lower() for prompt in prompts}) == len(prompts)
