"""The simulation finds no violation, replays exactly, and finds reintroduced faults."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = {
    "task_ends_with_its_first_error": "threads_fail",
    "deleted_keys_work": "keys_change",
    "prompts_are_not_counted": "none",
    "ready_without_audit_log": "disk_fills",
    "removed_audit_log_is_written_on": "audit_log_is_deleted",
    "part_is_proof": "wrong_answers",
    "lost_revision_is_502": "engine_loses_a_plan",
    "promotion_moves": "policy_waits,promote",
    "rejoined_engine_keeps_rows": "engine_is_sick",
}
"""Past faults of the gateway, and the simulated faults that reveal each."""
SEEDS_FOR_A_FAULT = 60


COUNT_WORLDS = """
import gc
from simulation.run import run_seed
from simulation.world import World
for seed in range(4):
    run_seed(seed)
gc.collect()
print(sum(isinstance(held, World) for held in gc.get_objects()))
"""


def run(*arguments: str) -> str:
    """Python's output with the simulation on its path."""
    path = os.pathsep.join((str(ROOT / "tests"), str(ROOT)))
    command, environment = [sys.executable, *arguments], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr
    return done.stdout


def simulate(*arguments: str) -> tuple[dict[str, Any], str]:
    """The last line of a run as an object, and its whole output."""
    text = run("-m", "simulation", *arguments)
    return json.loads(text.splitlines()[-1]), text


def test_finished_seeds_are_freed() -> None:
    """A run of many seeds needs no more memory than a short one."""
    assert run("-c", COUNT_WORLDS) == "0\n"


def test_no_violation_is_found() -> None:
    """Three hundred seeds, or as many as a busy machine runs in that time, end without a violation."""
    reported, text = simulate("--seeds", "300", "--seconds", "50")
    assert reported["violations"] == 0, text
    assert reported["first_failing_seed"] is None


def test_seed_replays_exactly() -> None:
    """Two processes that run the same seed see identical events, to the last byte."""
    one, text = simulate("--seed", "3")
    two, again = simulate("--seed", "3")
    assert one["trace"] == two["trace"]
    assert text == again


def test_several_processes_find_the_same_as_one() -> None:
    """Three processes that share seeds print the same as one process, to the last byte."""
    arguments = ("--seeds", "30", "--keep-going", "--put-back", "deleted_keys_work", "--only", "keys_change")
    one, text = simulate(*arguments)
    three, again = simulate(*arguments, "--jobs", "3")
    assert one["violations"] > 0
    assert (one.pop("processes"), three.pop("processes")) == (1, 3)
    assert one == three
    assert text.splitlines()[:-1] == again.splitlines()[:-1]


@pytest.mark.parametrize("fault", FAULTS)
def test_reintroduced_fault_is_found(fault: str) -> None:
    """The simulation fails when a past fault is reintroduced."""
    reported, text = simulate("--seeds", str(SEEDS_FOR_A_FAULT), "--put-back", fault, "--only", FAULTS[fault])
    assert reported["first_failing_seed"] is not None, text
