"""Jobs that are told to stop: one line, everything opened is closed, the signals are as before."""

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from discovery.jobs.stopping import Stopped, interruptible


@pytest.fixture(autouse=True)
def heard_signals() -> Iterator[None]:
    """SIGINT as a program in the foreground has it: a shell starts background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_a_job_in_one_line_and_closes_what_is_open(number: signal.Signals) -> None:
    """The line names the signal and what is on disk; resources are closed and handlers restored."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    closed: list[str] = []

    async def job() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.Event().wait()
        finally:
            closed.append("job")

    expected = f"stopped by {number.name}: steps are in x; run the same command again to resume"

    def run() -> None:
        with interruptible("steps are in x"), ExitStack() as stack:
            stack.callback(closed.append, "gateway")
            asyncio.run(job())

    with pytest.raises(Stopped, match=expected):
        run()
    assert closed == ["job", "gateway"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
