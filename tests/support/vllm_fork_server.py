"""A process that imports vLLM once and runs programs in forks: the import takes many seconds.

An order is JSON: `argv`, `environment`, `log`. `argv` names a file to run, or `-m` and a module. The server
answers `{"pid": …}` at once, and `{"pid": …, "status": …}` when the program has ended. When the connection
closes, it ends the programs that still run. `ForkServer` is the client.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any


class ForkServer:
    """A running fork server, for one thread at a time."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._ended: dict[int, int] = {}

    def start(self, *argv: object, log: Path, **environment: str) -> int:
        """Start a program; returns its process id. Its output goes to ``log``."""
        order = {
            "argv": [str(word) for word in argv],
            "log": str(log),
            "environment": os.environ | environment,
        }
        self._connection.send_bytes(json.dumps(order).encode())
        while "status" in (reported := self._hear(120)):
            self._ended[reported["pid"]] = reported["status"]
        return int(reported["pid"])

    def wait(self, pid: int, timeout_s: float) -> int:
        """Status of a started program once it has ended: exit status, or minus the signal."""
        end = time.monotonic() + timeout_s
        while pid not in self._ended:
            reported = self._hear(end - time.monotonic())
            self._ended[reported["pid"]] = reported["status"]
        return self._ended.pop(pid)

    def run(self, *argv: object, log: Path, timeout_s: float = 300, **environment: str) -> int:
        """Run a program to its end; returns its status."""
        return self.wait(self.start(*argv, log=log, **environment), timeout_s)

    def close(self) -> None:
        """Stop it, and all programs it still runs."""
        self._connection.close()
        self._process.wait(60)

    def _hear(self, timeout_s: float) -> dict[str, int]:
        if not self._connection.poll(max(timeout_s, 0)):
            raise TimeoutError("a program in vLLM's fork server has not ended in time")
        reported: dict[str, int] = json.loads(self._connection.recv_bytes())
        return reported


def main(orders: Connection) -> None:
    """Import vLLM, then serve orders until they end."""
    import vllm.entrypoints.llm  # noqa: F401 (what takes long is done before the first fork)
    import vllm.model_executor.models.registry as registry

    # vLLM inspects a model's class in a process that imports all of vLLM anew; a fork is faster.
    registry._run_in_subprocess = lambda look: look()
    running: dict[int, int] = {}
    """Process id by its pidfd."""
    while True:
        watched: list[Any] = [orders, *running]
        ready, _, _ = select.select(watched, [], [])
        for ended in (fd for fd in ready if isinstance(fd, int)):
            pid = running.pop(ended)
            os.close(ended)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            orders.send_bytes(json.dumps({"pid": pid, "status": status}).encode())
        if orders in ready:
            try:
                order = json.loads(orders.recv_bytes())
            except EOFError:
                break
            pid = os.fork()
            if pid == 0:
                for fd in (orders.fileno(), *running):
                    os.close(fd)
                _become(order)
            running[os.pidfd_open(pid)] = pid
            orders.send_bytes(json.dumps({"pid": pid}).encode())
    for pid in running.values():
        os.killpg(pid, signal.SIGTERM)


def _become(order: dict[str, Any]) -> None:
    """In the fork: run the program. Does not return."""
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.clear()
    os.environ.update(order["environment"])
    status = 1
    try:
        module, program = order["argv"][0] == "-m", order["argv"][1:]
        sys.argv = program if module else order["argv"]
        if module:
            runpy.run_module(program[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])))
