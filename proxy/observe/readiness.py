"""Whether requests can be served, and if not why: the one answer behind `/readyz`, gauge, log and alert."""

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
"""Why requests are refused, in words that never change: shown to anybody, and a label of metrics."""
CODES: Final[tuple[Code, ...]] = get_args(Code)
_LOOK_EVERY_S: Final = 1.0


@dataclass(frozen=True)
class Reason:
    """One thing for which requests are refused."""

    code: Code
    detail: str
    """What exactly, for operators: stands in the log and on the admin listener."""


Check = Callable[[], Iterable[Reason]]
"""Gives what is wrong at the moment of asking; nothing, when all is well. Must be quick and not raise."""


class Readiness:
    """Asks everybody who can refuse all requests. Each says for itself, by `add`, whether it does."""

    def __init__(self, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._checks: list[Check] = []
        self._log = log
        self._told: frozenset[Code] = frozenset()
        self._was_ready = False
        self.ready = asyncio.Event()
        """Set while requests can be served; as new as the last `look`."""
        metrics.ready.set_function(lambda: not self.reasons())
        for code in CODES:
            metrics.not_ready.labels(code).set_function(partial(self._has, code))

    def add(self, check: Check) -> None:
        """Ask ``check`` too from now on."""
        self._checks.append(check)

    def reasons(self) -> list[Reason]:
        """Why requests cannot be served now; empty when they can."""
        return [reason for check in self._checks for reason in check()]

    def look(self) -> None:
        """Write into the log what has changed since the last look."""
        reasons = self.reasons()
        codes = frozenset(reason.code for reason in reasons)
        if not codes:
            if not self.ready.is_set():
                self._log.info("gateway_ready")
            self._was_ready = True
            self.ready.set()
        else:
            self.ready.clear()
            if codes != self._told:
                starting = not self._was_ready and codes == {"engine_not_ready"}
                tell = self._log.info if starting else self._log.error
                tell("gateway_not_ready", reasons=sorted(codes), why=[reason.detail for reason in reasons])
        self._told = codes

    async def keep(self, alive: Callable[[], None]) -> None:
        """Look once a second, until cancelled."""
        while True:
            self.look()
            alive()
            await asyncio.sleep(_LOOK_EVERY_S)

    def _has(self, code: Code) -> bool:
        return any(reason.code == code for reason in self.reasons())
