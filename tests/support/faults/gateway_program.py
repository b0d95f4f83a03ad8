"""`mechctl serve` for the fault run: it lists its tasks on demand, and has a clock of its own.

On SIGUSR1 it writes the names of its asyncio tasks, one a line, to the file that FAULTS_TASKS names.
"""

import asyncio
import os
import signal
from pathlib import Path

from interpretops.cli import main

if __name__ == "__main__":
    # The engine's processes keep the machine's clock.
    os.environ.pop("LD_PRELOAD", None)
    file = Path(os.environ.pop("FAULTS_TASKS"))

    def write_tasks(_number: int, _frame: object) -> None:
        names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]
        partial = file.with_suffix(".partial")
        partial.write_text("\n".join(sorted(names)))
        partial.replace(file)

    signal.signal(signal.SIGUSR1, write_tasks)
    main()
