"""Tests that start engines run in one worker, whatever the number of workers."""

from pathlib import Path

from engine_scheduling import ENGINE, EnginesInOneWorker

ROOT = Path(__file__).resolve().parents[1]


def test_all_files_that_start_engines_go_to_one_worker() -> None:
    """Marked by a test or as a whole, they have one scope; every other file has its own."""
    split = EnginesInOneWorker.__dict__["_split_scope"]
    scheduling = EnginesInOneWorker.__new__(EnginesInOneWorker)
    scheduling._top = ROOT
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "clients" not in path.parts]
    scopes = {path: split(scheduling, f"{path.relative_to(ROOT)}::test_x[a::b]") for path in files}
    together = {path.name for path, scope in scopes.items() if scope == ENGINE}
    assert {"test_serve.py", "test_gates_in_engine.py", "test_walk.py", "test_faults.py"} <= together
    alone = [scope for scope in scopes.values() if scope != ENGINE]
    assert len(set(alone)) == len(alone) > 100
