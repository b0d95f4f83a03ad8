"""Compares how often a policy fires on live requests with a baseline window that an operator pinned."""

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
from proxy.observe.request_context import RequestContext
from proxy.policies.entry import Entry

_MAX_BYTES: Final = 16 * 2**20
WINDOW: Final = 2000
"""Most recent requests in the live window."""
MIN_REQUESTS: Final = 200
"""Fewest requests for a comparison. At this size, chance alone gives a PSI of about 0.05."""
_EDGES: Final = (0.0, 0.02, 0.1, 0.3, 0.7)
"""Upper edges of all bins but the last, in firings per token of a request. Zero has its own bin."""
_UPDATE_EVERY: Final = 20
"""Requests between updates of the metrics."""


class Baseline(Section):
    """A pinned window."""

    revision: str
    """The revision that it measured."""
    counts: tuple[int, ...] = Field(min_length=len(_EDGES) + 1, max_length=len(_EDGES) + 1)
    """Requests per bin."""
    by: str
    """Who pinned it."""
    at: str
    """When it was pinned, ISO 8601."""


_BASELINES: Final = TypeAdapter(dict[str, Baseline])


def psi(before: Sequence[int], now: Sequence[int]) -> float:
    """Population stability index of two histograms, with half a request added to every bin.

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
    """One live window per policy, and the baselines, stored in a file in ``folder``."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry], metrics: Metrics) -> None:
        """Raises `ConfigError` if the baselines file is malformed."""
        self._file = folder.expanduser() / "firing-baselines.json"
        self._entries = entries
        self._metrics = metrics
        self._windows: dict[str, _Window] = {}
        self._baselines: dict[str, Baseline] = _read(self._file)

    def note(self, context: RequestContext) -> None:
        """Count a finished request that has a receipt. Skips joint plans: they have no per-policy counts."""
        entry = self._entries.get(context.policy)
        if entry is None or entry.active is None or entry.active.revision != context.revision:
            return
        window = self._windows.get(context.policy)
        if window is None or window.revision != context.revision:
            window = self._windows[context.policy] = _Window(context.revision)
            for gauge in (self._metrics.drift, self._metrics.drift_requests):
                gauge.remove_by_labels({"policy": context.policy})
        # With a conditional gate, drift shows in how often it opens; otherwise in the number of edits.
        window.add((context.gates if entry.active.conditional else context.edits) / context.evaluated)
        if window.noted % _UPDATE_EVERY == 0:
            self._show(context.policy, window)

    def pin(self, policy: str, by: str) -> Baseline:
        """Pin the live window as baseline of the active revision. Raises `PolicyError` if it is too small."""
        window = self._windows.get(policy)
        n = 0 if window is None else len(window.bins)
        if window is None or n < MIN_REQUESTS:
            raise PolicyError(
                f"policy {policy!r} has had {n} requests since it became active, and a baseline needs "
                f"{MIN_REQUESTS}; pin it later"
            )
        # Another gateway may have written the file in the meantime.
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
            raise PolicyError(f"{self._file}: cannot be written ({error.strerror}); not pinned") from error
        self._baselines = baselines
        self._show(policy, window)
        return baselines[policy]

    def summary(self, policy: str) -> dict[str, Any] | None:
        """For the admin API: the baseline, the live window and their PSI."""
        window = self._windows.get(policy)
        if window is None:
            return None
        baseline = self._baseline(policy, window)
        compared = baseline is not None and len(window.bins) >= MIN_REQUESTS
        return {
            "psi": psi(baseline.counts, window.counts) if compared and baseline else None,
            "counts": window.counts,
            "baseline": None if baseline is None else baseline.model_dump(),
        }

    def _baseline(self, policy: str, window: _Window) -> Baseline | None:
        """The baseline, if it is of the same revision; other revisions are not comparable."""
        found = self._baselines.get(policy)
        return found if found is not None and found.revision == window.revision else None

    def _show(self, policy: str, window: _Window) -> None:
        baseline = self._baseline(policy, window)
        self._metrics.drift_requests.labels(policy, "live").set(len(window.bins))
        if baseline is None:
            return
        self._metrics.drift_requests.labels(policy, "baseline").set(sum(baseline.counts))
        if len(window.bins) >= MIN_REQUESTS:
            self._metrics.drift.labels(policy).set(psi(baseline.counts, window.counts))


def _read(path: Path) -> dict[str, Baseline]:
    try:
        return _BASELINES.validate_json(read_regular(path, _MAX_BYTES))
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise ConfigError(
            f"{path}: not a valid baselines file ({type(error).__name__}); delete it, and pin again"
        ) from None
