"""`mechctl eval`: what it measures when a line leaves it out."""

import sys
from typing import Any

import pytest

from discovery.evaluation import command
from mechctl.main import main


@pytest.mark.parametrize(
    ("arguments", "rounds", "parts"),
    [
        (("--policy", "own"), 12, 32),
        ((), 0, 0),
        (("--latency-rounds", "12"), 12, 0),
        (("--parts", "32"), 0, 32),
        (("--policy", "own", "--parts", "0"), 12, 0),
    ],
)
def test_latency_and_contributions_are_measured_only_for_a_named_policy(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], rounds: int, parts: int
) -> None:
    """Of all active policies neither is measured, unless the line asks for it; the data's folder is the
    environment's."""
    given: list[Any] = []
    monkeypatch.setattr(command, "run_eval", lambda *all_of_it: given.extend(all_of_it))
    monkeypatch.setattr(sys, "argv", ["mechctl", "eval", *arguments])
    monkeypatch.setenv("INTERPRETOPS_DATA", "s3://data")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    chosen = given[1]
    assert (chosen.latency_rounds, chosen.parts, chosen.data_folder) == (rounds, parts, "s3://data")
