"""A read that hangs blocks nothing else."""

import asyncio
import subprocess
import sys
import threading

import pytest

from proxy.process.file_reader import Reader, StuckError


async def test_result_or_error_of_the_work_is_given() -> None:
    """Finished work behaves as if it had been called directly."""
    reader = Reader("the folder")
    assert await reader.run(divmod, 7, 2) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        await reader.run(divmod, 7, 0)
    assert await reader.run(divmod, 7, 2) == (3, 1)


async def test_hanging_work_times_out_and_is_not_repeated() -> None:
    """At most one thread hangs; meanwhile calls fail at once; after it ends, calls work again."""
    reader, held, begun = Reader("the folder", 0.05), threading.Event(), []

    def hang() -> None:
        begun.append(threading.current_thread().daemon)
        held.wait(30)

    for _ in range(3):
        with pytest.raises(StuckError, match=r"the folder: could not be read within 0.05 s"):
            await reader.run(hang)
    assert begun == [True]
    running = reader._running
    held.set()
    await running
    assert await reader.run(divmod, 7, 2) == (3, 1)


async def test_next_call_waits_for_abandoned_work() -> None:
    """Two pieces of work never run concurrently, and abandoned work disturbs nobody."""
    reader, held, running = Reader("the folder"), threading.Event(), []

    def work() -> None:
        running.append("begun")
        held.wait(30)
        running.append("ended")
        raise OSError

    first = asyncio.create_task(reader.run(work))
    while not running:  # noqa: ASYNC110 - a thread's state
        await asyncio.sleep(0)
    first.cancel()
    second = asyncio.create_task(reader.run(running.append, "second"))
    held.set()
    await second
    assert running == ["begun", "ended", "second"]


HANGING = """
import asyncio, threading
from proxy.process.file_reader import Reader, StuckError

async def main():
    try:
        await Reader("the folder", 0.05).run(threading.Event().wait)
    except StuckError as error:
        print(error)

asyncio.run(main())
"""


def test_process_ends_although_a_read_hangs() -> None:
    """Neither the event loop nor Python's exit waits for a hanging read."""
    ended = subprocess.run([sys.executable, "-c", HANGING], capture_output=True, text=True, timeout=20)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "could not be read" in ended.stdout
