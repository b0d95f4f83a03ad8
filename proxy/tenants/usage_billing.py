"""Charges each request the tokens that the engine processed, even if its client disconnected early."""

from __future__ import annotations

import asyncio
from typing import Final

from interpretops.errors import EngineError
from proxy.engines.link import ProvenEngine
from proxy.observe.metrics import Metrics
from proxy.observe.request_context import RequestContext
from proxy.observe.supervisor import Supervisor
from proxy.tenants.limits import Charge

_STOPPING_S: Final = 0.5
"""The engine takes a moment to stop an aborted request; its receipt grows until then."""


class UsageBilling:
    """Settles at once if the receipt was read; otherwise asks the engine for it a moment later."""

    def __init__(self, metrics: Metrics, supervisor: Supervisor) -> None:
        self._metrics = metrics
        self._supervisor = supervisor
        self._tasks: set[asyncio.Task[None]] = set()

    def settle(
        self, charge: Charge, engine: ProvenEngine, context: RequestContext, unknown: int | None
    ) -> None:
        """Charge a finished request. A request that never reached the engine costs nothing.

        ``unknown``: charge if the engine has no receipt; None: charge the reserved tokens.
        """
        if context.nonce is None:
            charge.settle(0)
        elif context.tokens is not None:
            self._charge(charge, context.tenant, context.tokens)
        else:
            task = self._supervisor.spawn(
                "settlement", self._settle_later(charge, engine, context.nonce, context.tenant, unknown)
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for pending settlements."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _settle_later(
        self, charge: Charge, engine: ProvenEngine, nonce: str, tenant: str, unknown: int | None
    ) -> None:
        used = unknown
        try:
            await asyncio.sleep(_STOPPING_S)
            receipt = await engine.client.receipt(nonce)
            used = used if receipt is None else receipt.tokens
        except EngineError:
            pass
        finally:
            # Always settle: tokens that stay reserved would be lost from the tenant's budget.
            self._charge(charge, tenant, used)

    def _charge(self, charge: Charge, tenant: str, used: int | None) -> None:
        charge.settle(used)
        self._metrics.tokens.labels(tenant).inc(used or 0)
