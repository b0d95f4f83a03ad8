"""Runs one seed, and returns the outcome."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
import traceback
from dataclasses import dataclass, field
from pathlib import Path

from simulation.clock import Clock
from simulation.loop import SimulatedLoop
from simulation.patches import Disk, Notices, patched
from simulation.put_back import PUT_BACK
from simulation.trace import Trace
from simulation.world import World


@dataclass
class Outcome:
    """The outcome of one seed."""

    seed: int
    steps: int
    violations: list[str]
    trace: str
    """Hash of all events."""
    lines: list[str] = field(repr=False)


def run_seed(
    seed: int, *, only: frozenset[str] | None = None, fault: str | None = None, keep_all: bool = False
) -> Outcome:
    """One run, which depends only on the seed and the code.

    only: names of the faults to use; None: all. fault: one of `PUT_BACK`.
    """
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="simulation-", dir=memory if memory.is_dir() else None))
    clock, disk, trace = Clock(), Disk(), Trace(keep_all=keep_all)
    trace.root = folder
    loop = SimulatedLoop(clock, random.Random(f"{seed}/loop"))
    asyncio.set_event_loop(loop)
    world: World | None = None
    try:
        notices = Notices()
        with (
            contextlib.ExitStack() as stack,
            patched(clock, random.Random(f"{seed}/secrets"), disk, notices),
        ):
            if fault is not None:
                PUT_BACK[fault](stack)
            world = World(seed, folder, clock, disk, notices, loop, trace, only)
            try:
                loop.run_until_complete(world.run())
            except Exception as error:
                text = "".join(traceback.format_exception(error)[-3:])
                world.invariants.fail(f"the run itself ended with {text}")
            _end_all(loop)
    finally:
        asyncio.set_event_loop(None)
        loop.close()
        shutil.rmtree(folder, ignore_errors=True)
    found = world.invariants
    for violation in found.violations:
        trace.add(clock.now, violation)
    return Outcome(seed, found.steps, found.violations, trace.digest, list(trace.lines))


def _end_all(loop: SimulatedLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=10))
