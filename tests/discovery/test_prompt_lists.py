"""The prompts that ship for training: readable, without repeats, and on one side each."""

from pathlib import Path

import pytest

from discovery.errors import DiscoveryError
from interpretops.files.strict_yaml import read_yaml

WRITTEN = Path(__file__).resolve().parents[2] / "discovery" / "prompts" / "written"
LANGUAGES = WRITTEN / "languages"
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


@pytest.mark.parametrize(
    ("name", "least"),
    [("users", {"benign": 400}), ("homonyms", {"borderline": 350, "harmful": 150})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_contrast_file_has_its_prompts_once(name: str, least: dict[str, int]) -> None:
    """A contrast file has enough prompts on each of its sides, and no prompt is also in another file."""
    lists = read_yaml(WRITTEN / f"{name}.yaml", DiscoveryError).data
    assert set(lists) == set(least)
    assert all(len(lists[side]) >= count for side, count in least.items())
    prompts = [prompt for listed in lists.values() for prompt in listed]
    assert all(isinstance(prompt, str) and prompt.strip() for prompt in prompts)
    own = {prompt.strip().lower() for prompt in prompts}
    assert len(own) == len(prompts)
    for other in WRITTEN.glob("*.yaml"):
        if other.stem != name:
            listed = read_yaml(other, DiscoveryError).data.values()
            assert not own & {str(prompt).strip().lower() for side in listed for prompt in side}
