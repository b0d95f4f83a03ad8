"""What the tests of the simulation share."""

from pathlib import Path

import pytest


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulation can be imported."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
