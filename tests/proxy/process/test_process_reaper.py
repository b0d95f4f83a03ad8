"""No process of an engine outlives its reaper, whoever dies first."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from proxy.process import process_reaper as reaper

# A main process, a child, and a grandchild outside the process group, all ignoring SIGTERM.
FAMILY = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
depth = int(sys.argv[1])
if depth:
    again = [sys.executable, "-c", sys.argv[2], str(depth - 1), sys.argv[2]]
    subprocess.Popen(again, start_new_session=depth == 1)
print(os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A reaper with three generations of processes that ignore SIGTERM; yields it and all process ids."""
    command = [sys.executable, "-c", FAMILY, "2", FAMILY]
    (tmp_path / "own").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-I", reaper.__file__, "0.3", str(tmp_path / "own"), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(3)]
    yield process, pids
    for pid in (process.pid, *pids):
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def assert_gone(pids: list[int] | tuple[int, int, int], timeout_s: float = 5.0) -> None:
    """Every process ends soon; a zombie counts as ended."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            ends = os.pidfd_open(pid)
            assert select.select([ends], [], [], timeout_s)[0], f"process {pid} still runs"
            os.close(ends)


def test_all_end_when_the_parent_closes_the_pipe(
    family: tuple[subprocess.Popen[str], list[int]], tmp_path: Path
) -> None:
    """Closing the pipe, which also happens when the parent is killed, ends all three generations."""
    process, pids = family
    process.stdin.close()
    assert_gone(pids)
    assert process.wait(5) == 128 + signal.SIGKILL
    assert not (tmp_path / "own").exists()


def test_all_end_on_sigterm(family: tuple[subprocess.Popen[str], list[int]]) -> None:
    """SIGTERM does the same."""
    process, pids = family
    process.terminate()
    assert_gone(pids)


def test_children_end_with_the_main_process(family: tuple[subprocess.Popen[str], list[int]]) -> None:
    """When the main process is killed, its orphans are killed too, and the reaper returns its status."""
    process, (main, *others) = family
    mother = psutil.Process(process.pid).children()[0].pid
    os.kill(mother, signal.SIGKILL)
    assert_gone((main, *others))
    assert process.wait(5) == 128 + signal.SIGKILL


def test_status_of_the_command_is_passed_on() -> None:
    """The reaper exits with the command's status."""
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    command = [sys.executable, "-I", reaper.__file__, "1", "/nowhere", *command]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        assert process.wait(10) == 7


def test_main_process_ends_when_the_reaper_is_killed(family: tuple[subprocess.Popen[str], list[int]]) -> None:
    """Killing the reaper kills the engine's main process too."""
    process, _ = family
    mother = psutil.Process(process.pid).children()[0].pid
    process.kill()
    assert_gone([mother])


def test_reaper_imports_only_the_standard_library() -> None:
    """It runs isolated, as a file."""
    text = Path(reaper.__file__).read_text()
    assert "from proxy" not in text
    assert "import interpretops" not in text
