"""The simulated operator's files are what the invariants assume."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Drawn(random.Random):
    """A random source with scripted values."""

    def __init__(self, *numbers: float) -> None:
        super().__init__(0)
        self.numbers = list(numbers)

    def uniform(self, a: float, b: float) -> float:
        return self.numbers.pop(0)


@pytest.fixture
def make_files(simulation: None, tmp_path: Path) -> Callable[..., Any]:
    """Make the operator's files, with the given scales."""

    def make(*scales: float) -> Any:
        from simulation.files import Files
        from simulation.patches import Disk
        from simulation.scenario import Scenario

        scenario = Scenario(bindings=[], engines=1, keys=False, audit=False, clients=1, active_s=1.0)
        return Files(tmp_path / "folder", scenario, Drawn(*scales), Disk())

    return make


def test_rewritten_policy_never_returns_to_an_earlier_revision(make_files: Callable[..., Any]) -> None:
    """A rewritten policy is a new revision, even if the same scale is drawn again."""
    files = make_files(0.5, 0.5, 0.5, 0.5, 0.6)
    beta = files.policies / "beta.yaml"
    assert "scale: 0.5}" in beta.read_text()
    files.write("beta")
    assert "scale: 0.6}" in beta.read_text()


def test_reverted_policy_is_an_earlier_revision(make_files: Callable[..., Any]) -> None:
    """A reverted file is byte-identical to its earlier content."""
    files = make_files(0.5, 0.5, 0.5, 0.6)
    beta = files.policies / "beta.yaml"
    held = {beta.read_text()}
    files.write("beta", criteria=True)
    held.add(beta.read_text())
    found = set()
    for _ in range(40):
        files.change_back("beta")
        found.add(beta.read_text())
    assert found == held
