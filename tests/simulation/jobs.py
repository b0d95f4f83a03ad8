"""Runs seeds, in one process or several, and reports results in seed order."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from simulation.run import Outcome, run_seed


@dataclass(frozen=True)
class Order:
    """Options that apply to every seed."""

    only: frozenset[str] | None = None
    """Names of the faults to use; None: all."""
    fault: str | None = None
    """One of `PUT_BACK`."""
    until: float | None = None
    """Monotonic time after which no seed starts."""
    keep_lines: bool = False
    """Whether to print all events."""

    def run(self, seed: int) -> tuple[int, Outcome] | None:
        """Id of the process that ran the seed, and the outcome; None if time was up."""
        if self.until is not None and time.monotonic() > self.until:
            return None
        outcome = run_seed(seed, only=self.only, fault=self.fault, keep_all=self.keep_lines)
        if not self.keep_lines:
            outcome.lines.clear()
        gc.collect()
        return os.getpid(), outcome


def outcomes(seeds: Sequence[int], order: Order, jobs: int) -> Generator[tuple[int, Outcome], None, None]:
    """The outcomes in seed order; seeds not yet started when the caller stops never start."""
    if jobs == 1:
        _prepare()
        yield from filter(None, map(order.run, seeds))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare) as pool:
        yield from filter(None, pool.map(order.run, seeds))


def _prepare() -> None:
    logging.disable(logging.CRITICAL)
    # Objects created by imports stay: exclude them from garbage collection.
    gc.freeze()
