"""Our own prompts by language: every file has its three lists, filled, and no prompt occurs twice."""

from collections import Counter
from pathlib import Path

import pytest

from discovery.errors import DiscoveryError
from interpretops.files.strict_yaml import read_yaml

FOLDER = Path(__file__).resolve().parents[3] / "discovery" / "prompts" / "written" / "languages"
FILES = sorted(FOLDER.glob("*.yaml"))
LEAST = {"benign": 70, "borderline": 25, "harmful": 25}
"""The fewest prompts that a list may have. Fewer would let one language weigh less than the others."""


def _lists(path: Path) -> dict[str, list[str]]:
    content = read_yaml(path, DiscoveryError).data
    assert isinstance(content, dict)
    return content


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_language_has_its_three_lists(path: Path) -> None:
    """Every language has benign, borderline and harmful prompts, enough of each, and nothing else."""
    lists = _lists(path)
    assert set(lists) == set(LEAST)
    for name, least in LEAST.items():
        assert all(isinstance(prompt, str) and prompt.strip() for prompt in lists[name])
        assert len(lists[name]) >= least, name


def test_no_prompt_occurs_twice() -> None:
    """No prompt is in two lists or two languages, nor twice in one list, whatever its case and spacing."""
    assert FILES
    seen = Counter(
        " ".join(prompt.casefold().split())
        for path in FILES
        for prompts in _lists(path).values()
        for prompt in prompts
    )
    assert [prompt for prompt, times in seen.items() if times > 1] == []
