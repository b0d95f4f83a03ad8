"""Compares how a policy fires on its live requests with a window of them that an operator has pinned."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import Field, TypeAdapter, ValidationError

from interpretops.errors import ConfigError, PolicyError
from interpretops.files.atomic_file import PRIVATE, write_atomically
from interpretops.files.regular_file import read_regular
from interpretops.settings.section import Section
from proxy.observe.metrics import Metrics
from proxy.observe.request_context import Trail
from proxy.policies.entry import Entry

_MOST_BYTES: Final = 16 * 2**20
WINDOW: Final = 2000
"""Requests that are looked back on."""
LEAST: Final = 200
"""Requests before a window says anything: of two that are alike, PSI is then about 0.05 by chance."""
_EDGES: Final = (0.0, 0.02, 0.1, 0.3, 0.7)
"""Upper ends of all bins but the last: of firings per token of a request. None at all is a bin of its own."""
_EVERY: Final = 20
"""Requests from one computation to the next."""


class Baseline(Section):
    """A window that an operator pinned."""

    revision: str
    """Of which it was."""
    counts: tuple[int, ...] = Field(min_length=len(_EDGES) + 1, max_length=len(_EDGES) + 1)
    """Requests by bin."""
    by: str
    """Who pinned it."""
    at: str
    """When."""


_BASELINES: Final = TypeAdapter(dict[str, Baseline])


def psi(before: Sequence[int], now: Sequence[int]) -> float:
    """Population stability index of two histograms, half a request added to every bin.

    sum over bins of (p - q) ln(p / q). Below 0.1 is called stable, over 0.25 a shift.
    """
    p = [(count + 0.5) / (sum(before) + 0.5 * len(before)) for count in before]
    q = [(count + 0.5) / (sum(now) + 0.5 * len(now)) for count in now]
    return sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))


@dataclass
class _Window:
    """The newest requests of one revision."""

    revision: str
    bins: deque[int] = field(default_factory=deque)
    counts: list[int] = field(default_factory=lambda: [0] * (len(_EDGES) + 1))
    noted: int = 0

    def add(self, firings_per_token: float) -> None:
        index = sum(firings_per_token > edge for edge in _EDGES)
        self.bins.append(index)
        self.counts[index] += 1
        self.noted += 1
        if len(self.bins) > WINDOW:
            self.counts[self.bins.popleft()] -= 1


class Drift:
    """One window for each policy, and the baselines in a file of ``folder``."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry], metrics: Metrics) -> None:
        """Raises `ConfigError` for a file of baselines that is none."""
        self._file = folder.expanduser() / "firing-baselines.json"
        self._entries = entries
        self._metrics = metrics
        self._windows: dict[str, _Window] = {}
        self._baselines: dict[str, Baseline] = _read(self._file)

    def note(self, trail: Trail) -> None:
        """A request that has ended with a receipt; of several policies made one, nothing is known of each."""
        entry = self._entries.get(trail.policy)
        if entry is None or entry.active is None or entry.active.revision != trail.revision:
            return
        window = self._windows.get(trail.policy)
        if window is None or window.revision != trail.revision:
            window = self._windows[trail.policy] = _Window(trail.revision)
            for gauge in (self._metrics.drift, self._metrics.drift_requests):
                gauge.remove_by_labels({"policy": trail.policy})
        # Where a condition decides, what it decides is what may drift; else what was edited.
        window.add((trail.gates if entry.active.conditional else trail.edits) / trail.evaluated)
        if window.noted % _EVERY == 0:
            self._show(trail.policy, window)

    def pin(self, policy: str, by: str) -> Baseline:
        """Make the newest requests the baseline of the active revision. Raises `PolicyError` when too few."""
        window = self._windows.get(policy)
        n = 0 if window is None else len(window.bins)
        if window is None or n < LEAST:
            raise PolicyError(
                f"policy {policy!r} was seen on {n} requests since it became active, and a baseline needs "
                f"{LEAST}; pin it later"
            )
        # Another gateway may have written meanwhile.
        baselines = _read(self._file)
        baselines[policy] = Baseline(
            revision=window.revision,
            counts=tuple(window.counts),
            by=by,
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        try:
            write_atomically(self._file, _BASELINES.dump_json(baselines), PRIVATE)
        except OSError as error:
            raise PolicyError(f"{self._file} cannot be written ({error.strerror}); pinned none") from error
        self._baselines = baselines
        self._show(policy, window)
        return baselines[policy]

    def shown(self, policy: str) -> dict[str, Any] | None:
        """For operators: the baseline, the window, and how far they are apart."""
        window = self._windows.get(policy)
        if window is None:
            return None
        baseline = self._baseline(policy, window)
        compared = baseline is not None and len(window.bins) >= LEAST
        return {
            "psi": psi(baseline.counts, window.counts) if compared and baseline else None,
            "counts": window.counts,
            "baseline": None if baseline is None else baseline.model_dump(),
        }

    def _baseline(self, policy: str, window: _Window) -> Baseline | None:
        """The pinned window of the same revision: another reads otherwise."""
        found = self._baselines.get(policy)
        return found if found is not None and found.revision == window.revision else None

    def _show(self, policy: str, window: _Window) -> None:
        baseline = self._baseline(policy, window)
        self._metrics.drift_requests.labels(policy, "live").set(len(window.bins))
        if baseline is None:
            return
        self._metrics.drift_requests.labels(policy, "baseline").set(sum(baseline.counts))
        if len(window.bins) >= LEAST:
            self._metrics.drift.labels(policy).set(psi(baseline.counts, window.counts))


def _read(path: Path) -> dict[str, Baseline]:
    try:
        return _BASELINES.validate_json(read_regular(path, _MOST_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{path}: is no record of baselines ({type(error).__name__}); delete it, and pin them anew"
        ) from None
