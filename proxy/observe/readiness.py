"""Whether requests can be served, and if not, why: the one source for `/readyz`, metrics, log and alerts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, get_args

from structlog.typing import FilteringBoundLogger

from proxy.observe.metrics import Metrics

Code = Literal[
    "engine_not_ready",
    "engines_left_alone",
    "policy_missing",
    "policy_suspended",
    "audit_failing",
    "limits_away",
    "task_down",
    "keys_unusable",
    "binding_unmatched",
]
"""Stable reason codes: public in `/readyz`, and a metric label."""
CODES: Final[tuple[Code, ...]] = get_args(Code)
_CHECK_EVERY_S: Final = 1.0


@dataclass(frozen=True)
class Reason:
    """One reason why requests are refused."""

    code: Code
    detail: str
    """Details for operators, in the log and the admin API."""


Check = Callable[[], Iterable[Reason]]
"""Yields what is wrong now, or nothing. Must be fast and must not raise."""


class Readiness:
    """Combines the checks of all components that can refuse every request; each registers with `add`."""

    def __init__(self, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._checks: list[Check] = []
        self._log = log
        self._last_codes: frozenset[Code] = frozenset()
        self._was_ready = False
        self.ready = asyncio.Event()
        """Set while requests can be served, as of the last `log_changes`."""
        metrics.ready.set_function(lambda: not self.reasons())
        for code in CODES:
            metrics.not_ready.labels(code).set_function(partial(self._has, code))

    def add(self, check: Check) -> None:
        """Register a check."""
        self._checks.append(check)

    def reasons(self) -> list[Reason]:
        """Why requests cannot be served now; empty if they can."""
        return [reason for check in self._checks for reason in check()]

    def log_changes(self) -> None:
        """Log what has changed since the last call, and update `ready`."""
        reasons = self.reasons()
        codes = frozenset(reason.code for reason in reasons)
        if not codes:
            if not self.ready.is_set():
                self._log.info("gateway_ready")
            self._was_ready = True
            self.ready.set()
        else:
            self.ready.clear()
            if codes != self._last_codes:
                starting = not self._was_ready and codes == {"engine_not_ready"}
                emit = self._log.info if starting else self._log.error
                emit("gateway_not_ready", reasons=sorted(codes), why=[reason.detail for reason in reasons])
        self._last_codes = codes

    async def keep(self, alive: Callable[[], None]) -> None:
        """Check once a second, until cancelled."""
        while True:
            self.log_changes()
            alive()
            await asyncio.sleep(_CHECK_EVERY_S)

    def _has(self, code: Code) -> bool:
        return any(reason.code == code for reason in self.reasons())
