"""All background services, in the order in which they start. They stop in reverse order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from interpretops import __version__
from interpretops.errors import EngineError
from proxy.admin.watch import watch_certificates, watch_keys, watch_notifications, watch_policies
from proxy.engines.fleet_loop import FleetLoop
from proxy.observe.audit_log import AuditLog
from proxy.observe.supervisor import end
from proxy.state import Gateway
from proxy.tenants.budget import Budgets
from proxy.tenants.shared_limits import SharedCounts

Service = Callable[[], AbstractAsyncContextManager[None]]


class Services:
    """The background services of one gateway. `running` starts them, and stops them all even if one fails."""

    def __init__(
        self, gateway: Gateway, engine_loop: FleetLoop, budgets: Budgets, shared: SharedCounts | None
    ) -> None:
        self._gateway = gateway
        self._engine_loop = engine_loop
        self._budgets = budgets
        self._shared = shared

    def in_order(self) -> list[Service]:
        """The services that the settings enable, in start order."""
        settings = self._gateway.settings
        services: list[tuple[bool, Service]] = [
            # First: all others may write audit records.
            (self._gateway.audit is not None, self._audit),
            (True, self._stray_failures),
            (True, self._tracing),
            (True, self._engines),
            (True, self._readiness),
            # Stops after all requests have ended, while the engines still have their receipts.
            (True, self._usage_counters),
            (True, self._transcripts),
            (self._gateway.canary.enabled, self._canary),
            (self._gateway.access.keys_required, self._keys),
            (True, self._certificates),
            (settings.gateway.watch_policies, self._policies),
        ]
        return [service for enabled, service in services if enabled]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start the services in order. On exit stop all of them in reverse, even if one fails."""
        async with AsyncExitStack() as stack:
            for service in self.in_order():
                await stack.enter_async_context(service())
            yield

    @asynccontextmanager
    async def _audit(self) -> AsyncIterator[None]:
        audit = self._gateway.audit
        assert isinstance(audit, AuditLog)
        audit.append("gateway_started", version=__version__)
        task = self._gateway.supervisor.keep("audit", audit.keep)
        try:
            yield
        finally:
            await end(task)
            audit.append("gateway_stopped")
            await audit.close()

    @asynccontextmanager
    async def _stray_failures(self) -> AsyncIterator[None]:
        running = asyncio.get_running_loop()
        before = running.get_exception_handler()
        running.set_exception_handler(self._gateway.supervisor.on_loop_exception)
        try:
            yield
        finally:
            running.set_exception_handler(before)

    @asynccontextmanager
    async def _tracing(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            await self._gateway.tracing.close()

    @asynccontextmanager
    async def _engines(self) -> AsyncIterator[None]:
        loop = self._engine_loop
        loop.task = self._gateway.supervisor.keep("engines", loop.run, ends_with=(EngineError,))
        try:
            yield
        finally:
            await end(loop.task)
            await loop.close()
            await self._gateway.catalogue.residency.close()

    @asynccontextmanager
    async def _readiness(self) -> AsyncIterator[None]:
        task = self._gateway.supervisor.keep("readiness", self._gateway.readiness.keep)
        try:
            yield
        finally:
            await end(task)

    @asynccontextmanager
    async def _usage_counters(self) -> AsyncIterator[None]:
        gateway = self._gateway
        tasks = [gateway.supervisor.keep("budgets", self._budgets.keep)]
        if self._shared is not None:
            tasks.append(gateway.supervisor.keep("shared limits", self._shared.keep))
        try:
            yield
        finally:
            await end(*tasks)
            await gateway.shadows.close()
            await gateway.billing.close()
            self._budgets.close()
            if self._shared is not None:
                await self._shared.close()

    @asynccontextmanager
    async def _transcripts(self) -> AsyncIterator[None]:
        transcripts, supervisor = self._gateway.transcripts, self._gateway.supervisor
        tasks = [
            supervisor.keep("transcripts", transcripts.run),
            supervisor.keep("retention", transcripts.sweep),
        ]
        try:
            yield
        finally:
            await end(*tasks)
            await transcripts.close()

    @asynccontextmanager
    async def _canary(self) -> AsyncIterator[None]:
        task = self._gateway.supervisor.keep("canary", self._gateway.canary.keep)
        try:
            yield
        finally:
            await end(task)

    @asynccontextmanager
    async def _keys(self) -> AsyncIterator[None]:
        access = self._gateway.access
        task = self._gateway.supervisor.keep("keys", lambda alive: watch_keys(access, alive))
        try:
            yield
        finally:
            await end(task)

    @asynccontextmanager
    async def _certificates(self) -> AsyncIterator[None]:
        gateway = self._gateway
        task = gateway.supervisor.keep(
            "certificates",
            lambda alive: watch_certificates(gateway.tls_listeners, gateway.metrics, gateway.log, alive),
        )
        try:
            yield
        finally:
            await end(task)

    @asynccontextmanager
    async def _policies(self) -> AsyncIterator[None]:
        gateway, changed = self._gateway, asyncio.Event()
        folder = gateway.settings.paths.policies
        tasks = [
            gateway.supervisor.keep(
                "policies",
                lambda alive: watch_policies(changed, gateway.intake, gateway.fleet, gateway.log, alive),
            ),
            gateway.supervisor.keep(
                "policy notifications", lambda alive: watch_notifications(folder, changed, alive)
            ),
        ]
        try:
            yield
        finally:
            await end(*tasks)
