"""Runs faults in succession under traffic, measures before and after each, and judges the whole."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from faults.breakages import Breakage
from faults.leaks import Figures, settle
from faults.stand import Stand
from faults.traffic import Traffic

_ANSWERS = ("steered", "refused", "broken_off", "unsteered", "misshapen")
_NO_ANSWERS = ("left", "unfinished")
"""Clients that disconnected, and those closed because their headers were incomplete."""


@dataclass
class Outcome:
    """The result of the run."""

    faults: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    """Error codes that callers got for engine failures, and how often."""
    wrong: list[str] = field(default_factory=list)
    """Wrong answers, faults without recovery, and missing records."""
    before: Figures | None = None
    after: Figures | None = None

    @property
    def leaks(self) -> dict[str, Any]:
        """Figures that did not return to their earlier values."""
        return {} if self.before is None or self.after is None else self.after.more_than(self.before)

    def summary(self) -> dict[str, Any]:
        """Content of the last line."""
        return {
            "faults": len(self.faults),
            "answers": sum(self.counts[kind] for kind in _ANSWERS),
            "unsteered": self.counts["unsteered"],
            "leaks": len(self.leaks),
            **{kind: self.counts[kind] for kind in (*_ANSWERS, *_NO_ANSWERS)},
            "engine_failures": self.failures,
            "audit_intact": not any("audit" in line for line in self.wrong),
            "wrong": len(self.wrong),
            "before": None if self.before is None else self.before.numbers(),
            "after": None if self.after is None else self.after.numbers(),
        }


async def run_faults(stand: Stand, faults: Iterable[Breakage], tell: Callable[[str], None]) -> Outcome:
    """Run each fault under traffic, and measure once traffic has paused after it."""
    outcome, traffic = Outcome(), Traffic(stand)
    # The first requests fill caches and pools; the baseline is measured after them.
    async with traffic.running():
        await traffic.steered_again()
        await traffic.steered_again()
    outcome.before = before = await settle(stand, None)
    tell(f"before: {_show(before)}")
    for fault in faults:
        began, counts, failures = time.monotonic(), traffic.counts.copy(), traffic.failures.copy()
        try:
            async with traffic.running():
                await fault.break_and_mend(stand, traffic)
                await traffic.steered_again()
        except* (TimeoutError, AssertionError) as group:
            outcome.wrong += [f"{fault.name}: {error}" for error in group.exceptions]
        outcome.after = await settle(stand, before)
        outcome.faults.append(fault.name)
        tell(f"{fault.name} ({fault.how}), {time.monotonic() - began:.0f} s")
        tell("  " + ", ".join(f"{kind} {n}" for kind, n in sorted((traffic.counts - counts).items())))
        for line, times in sorted((traffic.failures - failures).items()):
            tell(f"  {line} ({times})")
        tell(f"  after: {_show(outcome.after)}")
        if grown := outcome.after.more_than(before):
            tell(f"  LEFT BEHIND: {grown}")
    outcome.counts = {kind: traffic.counts[kind] for kind in (*_ANSWERS, *_NO_ANSWERS)}
    for line, times in traffic.failures.items():
        reported = line.partition(": ")[2]
        outcome.failures[reported] = outcome.failures.get(reported, 0) + times
    outcome.wrong += traffic.faults
    outcome.wrong += _unrecorded(stand, traffic)
    return outcome


def check_audit(stand: Stand) -> list[str]:
    """Faults that `mechctl audit verify` reports; call it when the gateway has stopped."""
    command = [sys.executable, "-m", "mechctl.main", "audit", "verify", str(stand.disk / "audit.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True)
    return [] if done.returncode == 0 else [f"audit: {line}" for line in done.stdout.splitlines()]


def _unrecorded(stand: Stand, traffic: Traffic) -> list[str]:
    records = map(json.loads, (stand.disk / "audit.jsonl").read_text().splitlines())
    recorded = {record.get("request_id") for record in records}
    missing = traffic.steered_ids - recorded
    return [f"audit: {len(missing)} steered answers are not recorded"] if missing else []


def _show(figures: Figures) -> str:
    return ", ".join(f"{name} {value}" for name, value in figures.numbers().items())
