"""Runs seeds one after the other or in several processes at once; tells what came of each in their order."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from simulation.run import Outcome, run_seed


@dataclass(frozen=True)
class Order:
    """What every seed is run with."""

    only: frozenset[str] | None = None
    """Names of what may go wrong; None: everything."""
    fault: str | None = None
    """One of `PUT_BACK`."""
    until: float | None = None
    """Value of the monotonic clock from which on no seed begins."""
    keep_lines: bool = False
    """Whether all that happened is told."""

    def run(self, seed: int) -> tuple[int, Outcome] | None:
        """The process that ran the seed, and what came of it; None when time was up."""
        if self.until is not None and time.monotonic() > self.until:
            return None
        outcome = run_seed(seed, only=self.only, fault=self.fault, keep_all=self.keep_lines)
        if not self.keep_lines:
            outcome.lines.clear()
        gc.collect()
        return os.getpid(), outcome


def outcomes(seeds: Sequence[int], order: Order, jobs: int) -> Iterator[tuple[int, Outcome]]:
    """What came of each seed, in their order; seeds that have not begun when the caller stops never begin."""
    if jobs == 1:
        _prepare()
        yield from filter(None, map(order.run, seeds))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=_prepare) as pool:
        yield from filter(None, pool.map(order.run, seeds))


def _prepare() -> None:
    logging.disable(logging.CRITICAL)
    # What the imports made stays: no need to look at it after every seed.
    gc.freeze()
