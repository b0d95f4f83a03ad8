"""Watches for changes: policy files by notification or polling, keys and certificates every two seconds."""

from __future__ import annotations

import asyncio
from pathlib import Path

import watchfiles
from structlog.typing import FilteringBoundLogger

from interpretops.errors import InterpretOpsError
from proxy.engines.fleet import Fleet
from proxy.http.tls import TlsListeners
from proxy.observe.metrics import Metrics
from proxy.observe.supervisor import Alive
from proxy.policies.intake import Intake
from proxy.tenants.access import Access

_POLL_S = 2.0
"""Polling covers what notifications miss: network folders, folders created later, swapped symlinks."""


async def watch_policies(
    changed: asyncio.Event, intake: Intake, fleet: Fleet, log: FilteringBoundLogger, alive: Alive
) -> None:
    """Reload on every change, until cancelled. Contents are compared, so false alarms are cheap."""
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
    """Reread the key file until cancelled, so that a revoked key stops working within seconds."""
    while True:
        await asyncio.sleep(_POLL_S)
        await access.refresh_off_loop()
        alive()


async def watch_certificates(
    tls_listeners: TlsListeners, metrics: Metrics, log: FilteringBoundLogger, alive: Alive
) -> None:
    """Reload renewed certificates until cancelled; new connections use them within seconds."""
    while True:
        await asyncio.to_thread(tls_listeners.refresh, metrics, log)
        alive()
        await asyncio.sleep(_POLL_S)


async def watch_notifications(folder: Path, changed: asyncio.Event, alive: Alive) -> None:
    """Set ``changed`` on every file system notification below ``folder``, until cancelled."""
    while True:
        try:
            async for _ in watchfiles.awatch(folder, debounce=100, step=20, rust_timeout=5000):
                changed.set()
                alive()
        except OSError:
            await asyncio.sleep(_POLL_S)
