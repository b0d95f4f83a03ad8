"""Reloads everything that may change while the gateway runs, for the admin API and SIGHUP."""

from __future__ import annotations

import asyncio

from interpretops.errors import EngineError
from proxy.observe.supervisor import Alive
from proxy.policies.entry import ReloadReport
from proxy.state import Gateway


async def reload_everything(gateway: Gateway) -> ReloadReport:
    """Reload keys, certificates and the audit log's files, then every policy.

    Raises `EngineError` if no engine is ready to load policies; everything else has been reloaded by then.
    """
    await gateway.access.refresh_off_loop()
    failed = await asyncio.to_thread(gateway.tls_listeners.refresh, gateway.metrics, gateway.log)
    if gateway.access.failure is not None:
        failed[str(gateway.settings.paths.keys)] = gateway.access.failure
    if gateway.audit is not None:
        gateway.audit.check_files()
        if gateway.audit.failing is not None:
            failed["audit.path"] = gateway.audit.failing
    report = await gateway.intake.reload(force=True)
    report.failed.update(failed)
    report.keys = gateway.access.summary()
    return report


async def reload_on_signal(signal: asyncio.Event, gateway: Gateway, alive: Alive) -> None:
    """Reload as `POST /admin/reload` does whenever ``signal`` is set, until cancelled; log the result."""
    while True:
        await signal.wait()
        signal.clear()
        try:
            report = await reload_everything(gateway)
        except EngineError as error:
            gateway.log.warning("reload_postponed", error=str(error))
        else:
            emit = gateway.log.error if report.failed else gateway.log.info
            emit("reloaded", **report.summary())
        alive()
