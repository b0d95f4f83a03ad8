"""`mechctl serve` for the fault run: reports its tasks and threads on request, and has an adjustable clock.

On SIGUSR1 it writes the result of `state` to the file named by FAULTS_STATE.
"""

import asyncio
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from mechctl.main import main
from proxy.serve import POOL_NAME, POOL_THREADS


def state() -> dict[str, Any]:
    """Names of all tasks, number of all threads, and how many of these are idle pool threads."""
    frames = sys._current_frames()
    pool = [thread.ident for thread in threading.enumerate() if thread.name.startswith(f"{POOL_NAME}_")]
    # A busy thread has further frames above the pool's own loop.
    idle = [ident for ident in pool if ident in frames and frames[ident].f_code.co_name == "_worker"]
    return {
        "tasks": sorted(getattr(task.get_coro(), "__qualname__", "?") for task in asyncio.all_tasks()),
        "threads": len([*Path("/proc/self/task").iterdir()]),
        "pool_idle": min(len(idle), POOL_THREADS),
    }


if __name__ == "__main__":
    # The engine's processes keep the machine's clock.
    os.environ.pop("LD_PRELOAD", None)
    file = Path(os.environ.pop("FAULTS_STATE"))

    def write_state(_number: int, _frame: object) -> None:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(state()))
        partial.replace(file)

    signal.signal(signal.SIGUSR1, write_state)
    main()
