"""Progress: what a job says of its rate and of the time that is left where there is no terminal."""

import re

import pytest

from discovery.jobs import progress
from discovery.jobs.progress import Meter, meter


def test_rate_and_time_left_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line gives the work done, the total, the rate and the seconds left."""
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with meter("trace", 1000, "tokens") as shown:
        shown.advance(250, "mse 0.5")
    line = capsys.readouterr().err.strip()
    assert re.fullmatch(r"trace: 250/1,000 tokens, [\d,]+ tokens/s mse 0\.5, [\d,]+ s left", line)


def test_rate_of_a_resumed_run_counts_only_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of an earlier run does not raise the rate or shorten the time left."""
    now = 100.0
    monkeypatch.setattr("discovery.jobs.progress.time.monotonic", lambda: now)
    resumed = Meter("trace", 10_000, "tokens", done=9_000)
    now = 110.0
    resumed.advance(500)
    assert resumed.rate == pytest.approx(50.0)
