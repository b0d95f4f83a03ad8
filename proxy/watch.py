"""Notices that policy files changed, at once where the system tells, and keys, within two seconds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import watchfiles
from structlog.typing import FilteringBoundLogger

from interpretops.errors import InterpretOpsError
from proxy.access import Access
from proxy.fleet import Fleet
from proxy.intake import Intake

_POLL_S = 2.0
"""Covers what no notification tells of: network folders, a folder that is made later, swapped links."""


async def watch_policies(folder: Path, intake: Intake, fleet: Fleet, log: FilteringBoundLogger) -> None:
    """Reload on every change, until cancelled. Contents are compared, so a false alarm costs nothing."""
    changed = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_listen(folder, changed))
        while True:
            try:
                async with asyncio.timeout(_POLL_S):
                    await changed.wait()
            except TimeoutError:
                pass
            changed.clear()
            if fleet.current is None:
                continue
            try:
                await intake.reload()
            except InterpretOpsError as error:
                log.warning("reload_postponed", error=str(error))


async def watch_keys(access: Access) -> None:
    """Take changes of the file of keys, until cancelled: a revoked key opens nothing a moment later."""
    while True:
        await asyncio.sleep(_POLL_S)
        await asyncio.to_thread(access.refresh)


async def _listen(folder: Path, changed: asyncio.Event) -> None:
    while True:
        try:
            async for _ in watchfiles.awatch(folder, debounce=100, step=20, rust_timeout=5000):
                changed.set()
        except (FileNotFoundError, OSError):
            await asyncio.sleep(_POLL_S)
