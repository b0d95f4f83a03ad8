"""Runs one command, and kills all its processes when it ends or when the reaper's parent exits.

`python -I process_reaper.py GRACE_S FOLDER COMMAND…`, started as leader of its own session. Standard input
is a pipe held by the parent: when it closes, for whatever reason, the reaper stops the command. The reaper
adopts orphaned grandchildren, so that none outlives it even outside the process group. At the end it removes
the folder, which belongs to the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main(arguments: list[str]) -> int:
    """Run the command; returns its exit status, or 128 + the signal that ended it."""
    grace_s, folder, command = float(arguments[0]), arguments[1], arguments[2:]
    # The engine's sockets and files must only be accessible to its user, wherever it puts them.
    os.umask(0o077)
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake_reader, wake_writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def wake(_number: int, _frame: FrameType | None) -> None:
        """Does nothing: a handler must exist for the wakeup pipe to get a byte."""

    signal.set_wakeup_fd(wake_writer)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
        signal.signal(number, wake)
    child = subprocess.Popen(  # noqa: S603 - the command is the gateway's own
        command,
        stdin=subprocess.DEVNULL,
        # If the reaper itself is killed, the engine's main process is killed too.
        preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509 - no threads
    )
    deadline: float | None = None
    while child.poll() is None:
        watched = [wake_reader] if deadline else [wake_reader, sys.stdin.fileno()]
        timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
        readable, _, _ = select.select(watched, [], [], timeout_s)
        stop = sys.stdin.fileno() in readable
        if wake_reader in readable:
            stop = stop or any(number != signal.SIGCHLD for number in os.read(wake_reader, 4096))
        if deadline is None and stop:
            deadline = time.monotonic() + grace_s
            child.send_signal(signal.SIGTERM)
        elif deadline is not None and time.monotonic() >= deadline:
            child.kill()
            child.wait()
    _end_descendants()
    shutil.rmtree(folder, ignore_errors=True)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end_descendants() -> None:
    """Kill remaining descendants; orphans become our children one generation at a time."""
    while children := _children():
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> list[int]:
    me = os.getpid()
    found = Path(f"/proc/{me}/task/{me}/children").read_text(encoding="ascii")
    return [int(pid) for pid in found.split()]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
