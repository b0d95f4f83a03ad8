"""Notices changed policy files, at once where the system tells, and keys and certificates in two seconds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import watchfiles
from structlog.typing import FilteringBoundLogger

from interpretops.errors import InterpretOpsError
from proxy.engines.fleet import Fleet
from proxy.http.tls import Doorways
from proxy.observe.metrics import Metrics
from proxy.observe.supervisor import Alive
from proxy.policies.intake import Intake
from proxy.tenants.access import Access

_POLL_S = 2.0
"""Covers what no notification tells of: network folders, a folder that is made later, swapped links."""


async def watch_policies(
    changed: asyncio.Event, intake: Intake, fleet: Fleet, log: FilteringBoundLogger, alive: Alive
) -> None:
    """Reload on every change, until cancelled. Contents are compared, so a false alarm costs nothing."""
    while True:
        try:
            async with asyncio.timeout(_POLL_S):
                await changed.wait()
        except TimeoutError:
            pass
        changed.clear()
        if fleet.current is not None:
            try:
                await intake.reload()
            except InterpretOpsError as error:
                log.warning("reload_postponed", error=str(error))
        alive()


async def watch_keys(access: Access, alive: Alive) -> None:
    """Take changes of the file of keys, until cancelled: a revoked key opens nothing a moment later."""
    while True:
        await asyncio.sleep(_POLL_S)
        await access.look()
        alive()


async def watch_certificates(
    doorways: Doorways, metrics: Metrics, log: FilteringBoundLogger, alive: Alive
) -> None:
    """Take renewed certificates, until cancelled: new connections get them a moment later."""
    while True:
        await asyncio.to_thread(doorways.refresh, metrics, log)
        alive()
        await asyncio.sleep(_POLL_S)


async def hear_changes(folder: Path, changed: asyncio.Event, alive: Alive) -> None:
    """Set ``changed`` whenever the system tells of a change below ``folder``, until cancelled."""
    while True:
        try:
            async for _ in watchfiles.awatch(folder, debounce=100, step=20, rust_timeout=5000):
                changed.set()
                alive()
        except OSError:
            await asyncio.sleep(_POLL_S)
