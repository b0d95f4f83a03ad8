"""`mechctl policy diff` shows what changes between two policies, and what was measured of each."""

import subprocess
import sys
from pathlib import Path

import pytest

from interpretops.compile.difference import policy_changes
from interpretops.policy import load_policy


def diff(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`mechctl policy diff`, on a wide terminal."""
    command = [sys.executable, "-m", "mechctl.main", "policy", "diff", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=_environment())


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "COLUMNS": "160"}


@pytest.fixture
def changed(repository: Path, tmp_path: Path) -> Path:
    """The shipped guard with a lower threshold and a weaker edit."""
    text = (repository / "policies/jailbreak.yaml").read_text()
    assert "threshold: 0.675" in text
    assert "alpha: 1.0" in text
    path = tmp_path / "changed.yaml"
    path.write_text(text.replace("threshold: 0.675", "threshold: 0.6").replace("alpha: 1.0", "alpha: 0.8"))
    return path


@pytest.mark.usefixtures("default_model_dir")
def test_threshold_strength_edits_and_cards_are_shown(changed: Path) -> None:
    """A gate's threshold, an edit's strength, the sites whose numbers differ, and the one card there is."""
    done = diff("jailbreak", changed)
    assert (done.returncode, done.stderr) == (1, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "harmful-request.conditions[0].threshold 0.675 0.6" in lines
    assert "[0].alpha 1.0 0.8" in lines
    assert "site 16.resid_post 16 rank-one edits 16 rank-one edits, with other numbers" in lines
    assert "verdict pass -" in lines
    assert any(line.startswith("DE 9") and line.endswith("-") for line in lines)
    assert "there is no Risk Card" in done.stdout


@pytest.mark.usefixtures("default_model_dir")
def test_same_policy_has_no_differences() -> None:
    """Exit status 0 and one line, as with `diff`."""
    done = diff("jailbreak", "jailbreak")
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith("the same: both are jailbreak@")


def test_unknown_policy_is_one_line(tmp_path: Path) -> None:
    """For neither a file nor an id, the line says what to name."""
    done = diff("jailbrake", tmp_path / "none.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "name a file or an id" in done.stderr


def test_added_and_removed_parts_are_changes(repository: Path) -> None:
    """A gate or an intervention that only one policy has is shown beside a dash."""
    one = load_policy(repository / "policies/jailbreak.yaml")
    other = load_policy(repository / "policies/toxicity.yaml")
    changes = {(change.section, change.place): change for change in policy_changes(one, other)}
    assert changes["gates", "harmful-request"].after == "-"
    back = {(change.section, change.place): change for change in policy_changes(other, one)}
    assert back["gates", "harmful-request"].before == "-"
    assert policy_changes(one, one) == []
