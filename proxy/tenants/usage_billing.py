"""Charges each request what the engine did for it, also when its client left before the end."""

from __future__ import annotations

import asyncio
from typing import Final

from interpretops.errors import EngineError
from proxy.engines.link import ProvenEngine
from proxy.observe.metrics import Metrics
from proxy.observe.request_context import Trail
from proxy.observe.supervisor import Supervisor
from proxy.tenants.limits import Charge

_STOPPING_S: Final = 0.5
"""The engine needs a moment to stop a request that was given up; its receipt grows until then."""


class Settlements:
    """Settles at once where the receipt was read, else asks the engine for it a moment later."""

    def __init__(self, metrics: Metrics, supervisor: Supervisor) -> None:
        self._metrics = metrics
        self._supervisor = supervisor
        self._tasks: set[asyncio.Task[None]] = set()

    def settle(self, charge: Charge, engine: ProvenEngine, trail: Trail, unknown: int | None) -> None:
        """Charge a request that has ended. One that never reached the engine costs nothing.

        ``unknown`` is charged where the engine knows of no receipt; None: what was set aside.
        """
        if trail.nonce is None:
            charge.settle(0)
        elif trail.tokens is not None:
            self._charge(charge, trail.tenant, trail.tokens)
        else:
            task = self._supervisor.spawn(
                "settlement", self._settle_later(charge, engine, trail.nonce, trail.tenant, unknown)
            )
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for what is being settled."""
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
            # Whatever happens: what stays set aside would be gone from the tenant's budget.
            self._charge(charge, tenant, used)

    def _charge(self, charge: Charge, tenant: str, used: int | None) -> None:
        charge.settle(used)
        self._metrics.tokens.labels(tenant).inc(used or 0)
