"""How much of its token budget each tenant has used in the current day or month, kept across restarts."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from structlog.typing import FilteringBoundLogger

from interpretops.errors import ConfigError
from interpretops.files.atomic_file import PRIVATE, write_atomically
from interpretops.files.regular_file import read_regular
from proxy.observe.metrics import Metrics
from proxy.process.file_lock import hold

Period = Literal["day", "month"]
_MOST_BYTES: Final = 16 * 2**20
_SAVE_EVERY_S: Final = 1.0
_FORMATS: Final = {"day": "%Y-%m-%d", "month": "%Y-%m"}


class Budgets:
    """Tokens used by tenant and period; in a file of ``folder``, or in memory alone."""

    def __init__(
        self,
        folder: Path | None,
        metrics: Metrics,
        log: FilteringBoundLogger,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._file = None if folder is None else folder / "usage.json"
        self._metrics = metrics
        self._log = log
        self._unsaved: str | None = None
        """Why the file could not be written the last time."""
        self._now = now
        self._used: dict[str, tuple[str, int]] = {}
        """Tenant to the period that is running, and what was used in it."""
        self._changed = False
        self._lock: int | None = None
        if self._file is not None:
            self._lock = hold(self._file.with_suffix(".lock"), "paths.state")
            self._used = _read(self._file)

    def period(self, period: Period) -> str:
        """Name of the running period."""
        return self._now().strftime(_FORMATS[period])

    def correct(self, tenant: str, period: Period, used: int) -> None:
        """What all gateways together have used."""
        self._used[tenant] = self.period(period), used

    def used(self, tenant: str, period: Period) -> int:
        """Tokens used in the running period. A clock that is set back begins no new one."""
        name = self.period(period)
        begun, amount = self._used.get(tenant, (name, 0))
        return 0 if len(begun) != len(name) or name > begun else amount

    def add(self, tenant: str, period: Period, tokens: int) -> None:
        """Count tokens."""
        name = self.period(period)
        begun, _ = self._used.get(tenant, (name, 0))
        if len(begun) == len(name):
            name = max(name, begun)
        self._used[tenant] = name, self.used(tenant, period) + tokens
        self._changed = True

    async def keep(self, alive: Callable[[], None]) -> None:
        """Save what changed, every second, until cancelled."""
        while True:
            await asyncio.sleep(_SAVE_EVERY_S)
            await asyncio.to_thread(self.save)
            alive()

    def save(self) -> None:
        """Write the file when something changed; a disk that is full is tried again the next time."""
        if self._file is None or not self._changed:
            return
        self._changed = False
        fault: str | None = None
        try:
            write_atomically(self._file, json.dumps(self._used, sort_keys=True).encode(), PRIVATE)
        except OSError as error:
            self._changed, fault = True, error.strerror or type(error).__name__
            if fault != self._unsaved:
                self._log.error("budget_not_saved", file=str(self._file), error=fault)
        else:
            if self._unsaved is not None:
                self._log.info("budget_saved_again", file=str(self._file))
        self._unsaved = fault
        self._metrics.budgets_unsaved.set(fault is not None)

    def close(self) -> None:
        """Save, and let another gateway have the file."""
        self.save()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _read(path: Path) -> dict[str, tuple[str, int]]:
    try:
        content = json.loads(read_regular(path, _MOST_BYTES))
        return {str(tenant): (str(period), int(used)) for tenant, (period, used) in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is no record of budgets ({error}); mend it, or delete it to begin all budgets anew"
        ) from None
