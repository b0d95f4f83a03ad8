"""Reads again everything that may change while the gateway runs: for the admin's route, and for SIGHUP."""

from __future__ import annotations

import asyncio

from interpretops.errors import EngineError
from proxy.observe.supervisor import Alive
from proxy.policies.entry import ReloadReport
from proxy.state import Gateway


async def reload_everything(gateway: Gateway) -> ReloadReport:
    """Keys, certificates, the audit log's file, then every policy.

    Raises `EngineError` when no engine is there that policies could be loaded into; all else was read then.
    """
    await gateway.access.look()
    failed = await asyncio.to_thread(gateway.doorways.refresh, gateway.metrics, gateway.log)
    if gateway.access.failure is not None:
        failed[str(gateway.settings.paths.keys)] = gateway.access.failure
    if gateway.audit is not None:
        gateway.audit.look()
        if gateway.audit.failing is not None:
            failed["audit.path"] = gateway.audit.failing
    report = await gateway.intake.reload(force=True)
    report.failed.update(failed)
    report.keys = gateway.access.shown()
    return report


async def reload_when_told(told: asyncio.Event, gateway: Gateway, alive: Alive) -> None:
    """Do what `POST /admin/reload` does whenever ``told`` is set, until cancelled; log how it went."""
    while True:
        await told.wait()
        told.clear()
        try:
            report = await reload_everything(gateway)
        except EngineError as error:
            gateway.log.warning("reload_postponed", error=str(error))
        else:
            tell = gateway.log.error if report.failed else gateway.log.info
            tell("reloaded", **report.shown())
        alive()
