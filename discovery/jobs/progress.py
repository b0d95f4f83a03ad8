"""A job's progress: a bar with rate and time left on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0
SLOW_RATE = 10.0
"""Below this rate, in units per second, seconds per unit are shown instead."""


class Meter:
    """Counts units of work done. `done` starts above zero in a resumed run."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0, *, shown: bool = True) -> None:
        self._shown = shown
        self.title, self.total, self.unit, self.done = title, total, unit, done
        self._began_at = time.monotonic()
        self._before = done
        self._bar: Progress | None = None
        self._line_at = self._began_at

    @property
    def rate(self) -> float:
        """Units per second, counting only the work of this run."""
        return (self.done - self._before) / max(time.monotonic() - self._began_at, 1e-9)

    @property
    def pace(self) -> str:
        """Units per second, or seconds per unit if the work is slow."""
        if self.rate >= SLOW_RATE or self.rate == 0:
            return f"{self.rate:,.0f} {self.unit}/s"
        return f"{1 / self.rate:,.1f} s per {self.unit.removesuffix('s')}"

    def advance(self, amount: int, note: str = "") -> None:
        """Count work and show it."""
        self.done += amount
        text = f"{self.pace} {note}".rstrip()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, total=self.total, text=text)
        elif self._shown and (time.monotonic() - self._line_at >= LINE_EVERY_S or self.done >= self.total):
            self._line_at = time.monotonic()
            left = max(self.total - self.done, 0) / max(self.rate, 1e-9)
            sys.stderr.write(
                f"{self.title}: {self.done:,}/{self.total:,} {self.unit}, {text}, {left:,.0f} s left\n"
            )
            sys.stderr.flush()

    def attach(self, bar: Progress) -> None:
        """Show progress in a bar instead of lines."""
        self._bar = bar
        bar.add_task(self.title, total=self.total, completed=self.done, text="")


@contextmanager
def meter(title: str, total: int, unit: str, done: int = 0, *, shown: bool = True) -> Iterator[Meter]:
    """Show the progress of a job on stderr while the block runs, if ``shown``."""
    state = Meter(title, total, unit, done, shown=shown)
    if not shown or not sys.stderr.isatty():
        yield state
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        state.attach(bar)
        yield state
