"""What the soak calls proven, flat and stable, on answers and figures that are made up."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.soak import Soak, summarise
from benchmarks.soak_load import TURNING, Answer, Load, Turn

HELD = {"gateway_memory_mb": 80.0, "gateway_fds": 20.0, "gateway_tasks": 10.0, "engine_rows": 3.0}


@pytest.fixture
def soak(tmp_path: Path) -> Soak:
    """A minute of one answer a second, each of half a second, every other one streamed."""
    answers = [
        Answer(at, at + 0.5, bool(at % 2), "calm", first_event=at + 0.1, revision="a") for at in range(60)
    ]
    turns = [Turn("a", -1.0, 30.0), Turn("b", 29.0)]
    load = Load("", "", {}, tmp_path, answers, turns, reload_s=[1.0])
    samples = [{"at": float(at), **HELD} for at in range(0, 60, 10)]
    return Soak(load, subprocess.Popen(["true"]), samples)


def judged(soak: Soak, after: dict[str, float]) -> dict[str, object]:
    return summarise(soak, HELD, HELD | after, 0.0, 60.0)


def test_even_run_is_proven_flat_and_stable(soak: Soak) -> None:
    """Nothing to complain of: no fault, nothing grown, one p99 in all thirds."""
    found = judged(soak, {})
    assert (found["faults"], found["proven"], found["flat"], found["stable"]) == (0, 60, True, True)


@pytest.mark.parametrize(
    ("held", "grown"),
    [("gateway_memory_mb", 40), ("gateway_fds", 30), ("engine_rows", 1), ("gateway_tasks", 9)],
)
def test_what_grew_is_named(soak: Soak, held: str, grown: float) -> None:
    """More at rest in the end than at rest in the beginning is not flat."""
    found = judged(soak, {held: HELD[held] + grown})
    assert (found["grown"], found["flat"]) == ({held: grown}, False)


def test_slower_end_is_not_stable(soak: Soak) -> None:
    """Whole answers that take three times as long in the last third fail."""
    for answer in soak.load.answers[40:]:
        answer.ended += 1.0
    assert judged(soak, {})["stable"] is False


@pytest.mark.parametrize(
    ("began", "ended", "revision", "faults"),
    [(28.0, 30.5, "a", 0), (30.1, 30.5, "a", 1), (29.1, 29.5, "b", 0), (20.0, 28.0, "b", 1)],
)
def test_revision_must_have_been_in_force(
    soak: Soak, began: float, ended: float, revision: str, faults: int
) -> None:
    """The old one may end what began before its successor was acknowledged, and begin nothing after."""
    soak.load.answers.append(Answer(began, ended, False, TURNING, revision=revision))
    assert judged(soak, {})["faults"] == faults


def test_fault_of_one_answer_counts(soak: Soak) -> None:
    """An answer with another policy is reported with what was asked for."""
    soak.load.answers[3].fault = "calm was asked for, none was applied"
    found = judged(soak, {})
    assert (found["faults"], found["first_faults"]) == (1, ["calm: calm was asked for, none was applied"])
