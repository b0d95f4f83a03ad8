"""Tracks how much of its daily or monthly token budget each tenant has used, across restarts."""

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
_MAX_BYTES: Final = 16 * 2**20
_SAVE_EVERY_S: Final = 1.0
_FORMATS: Final = {"day": "%Y-%m-%d", "month": "%Y-%m"}


class Budgets:
    """Tokens used by tenant and period, saved in ``folder``, or kept in memory only."""

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
        """Why the last save failed."""
        self._now = now
        self._used: dict[str, tuple[str, int]] = {}
        """Tenant to the current period and the tokens used in it."""
        self._changed = False
        self._lock: int | None = None
        if self._file is not None:
            self._lock = hold(self._file.with_suffix(".lock"), "paths.state")
            self._used = _read(self._file)

    def period(self, period: Period) -> str:
        """Name of the current period."""
        return self._now().strftime(_FORMATS[period])

    def correct(self, tenant: str, period: Period, used: int) -> None:
        """Set usage to the total of all gateways."""
        self._used[tenant] = self.period(period), used

    def used(self, tenant: str, period: Period) -> int:
        """Tokens used in the current period. A clock that is set back does not start a new period."""
        name = self.period(period)
        begun, amount = self._used.get(tenant, (name, 0))
        return 0 if len(begun) != len(name) or name > begun else amount

    def add(self, tenant: str, period: Period, tokens: int) -> None:
        """Add used tokens."""
        name = self.period(period)
        begun, _ = self._used.get(tenant, (name, 0))
        if len(begun) == len(name):
            name = max(name, begun)
        self._used[tenant] = name, self.used(tenant, period) + tokens
        self._changed = True

    async def keep(self, alive: Callable[[], None]) -> None:
        """Save changes every second, until cancelled."""
        while True:
            await asyncio.sleep(_SAVE_EVERY_S)
            await asyncio.to_thread(self.save)
            alive()

    def save(self) -> None:
        """Write the file if usage changed. After a failure (full disk), the next call tries again."""
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
        """Save, and release the file's lock."""
        self.save()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _read(path: Path) -> dict[str, tuple[str, int]]:
    try:
        content = json.loads(read_regular(path, _MAX_BYTES))
        return {str(tenant): (str(period), int(used)) for tenant, (period, used) in content.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a valid budgets file ({error}); repair it, or delete it to reset all budgets"
        ) from None
