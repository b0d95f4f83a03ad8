"""The simulation finds nothing, replays exactly, and finds what is put back."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
KEPT = (
    *("engine_is_full", "engine_damages_plans", "policy_changes", "policy_waits", "policy_breaks"),
    *("policies_clash", "policy_is_deleted", "folder_vanishes", "reload", "promote", "disk_fills"),
    *("clock_jumps", "machine_sleeps", "gateway_restarts", "threads_fail", "keys_change"),
)
"""What goes wrong in the short run."""


def simulate(*arguments: str) -> tuple[dict[str, Any], str]:
    """The last line of a run as an object, and all that it printed."""
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    command = [sys.executable, "-m", "simulation", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


def test_nothing_is_found() -> None:
    """Twenty seeds end without a violation."""
    told, text = simulate("--seeds", "20", "--only", ",".join(KEPT))
    assert told["violations"] == 0, text
    assert told["seeds"] == 20
    assert told["first_failing_seed"] is None


def test_seed_replays_exactly() -> None:
    """Two processes that run one seed see the same things happen, to the last byte."""
    one, text = simulate("--seed", "3")
    two, again = simulate("--seed", "3")
    assert one["trace"] == two["trace"]
    assert text == again
