"""What the simulated operator leaves behind is what the invariants take it for."""

import random
from pathlib import Path

import pytest


class Drawn(random.Random):
    """Draws what it is told to."""

    def __init__(self, *numbers: float) -> None:
        super().__init__()
        self.numbers = list(numbers)

    def uniform(self, a: float, b: float) -> float:
        return self.numbers.pop(0)


@pytest.mark.usefixtures("simulation")
def test_rewritten_policy_never_returns_to_an_earlier_revision(tmp_path: Path) -> None:
    """A policy that is written again is another revision, even if the same scale is drawn again."""
    from simulation.files import Files
    from simulation.patches import Disk
    from simulation.scenario import POLICIES, Scenario

    chance = Drawn(*(0.5 for _ in POLICIES), 0.5, 0.6)
    scenario = Scenario(bindings=[], engines=1, keys=False, audit=False, clients=1, active_s=1.0)
    files = Files(tmp_path / "folder", scenario, chance, Disk())
    beta = tmp_path / "folder" / "policies" / "beta.yaml"
    assert "scale: 0.5}" in beta.read_text()
    files.write("beta")
    assert "scale: 0.6}" in beta.read_text()
