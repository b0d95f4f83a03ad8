"""The one engine that may be used now: proven to steer, or none."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from structlog.typing import FilteringBoundLogger

from interpretops.errors import EngineError
from interpretops.plan import ModelSpec
from proxy.engine_client import Attestation, EngineClient
from proxy.metrics import Metrics
from proxy.refusal import EngineNotReady


@dataclass(eq=False)
class ProvenEngine:
    """An engine whose plugin has attested itself and passed its self-test."""

    client: EngineClient
    boot_id: str
    spec: ModelSpec
    models: tuple[dict[str, Any], ...]
    """The engine's own entries of its model list."""
    attested: Attestation
    own: bool
    """Started by this gateway: no other process can ever answer at its address."""

    @property
    def served(self) -> frozenset[str]:
        """Names under which the engine serves the model."""
        return frozenset(model["id"] for model in self.models)

    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _checked: int = 0

    async def check_boot(self) -> None:
        """Raise unless the engine behind the address is still the process that was proven."""
        boot_id = (await self.client.attest()).boot_id
        if boot_id != self.boot_id:
            raise EngineError(f"engine was restarted: boot {boot_id!r} instead of {self.boot_id!r}")

    async def check_connections(self) -> None:
        """Raise unless every connection made until now leads to the process that was proven.

        A restarted engine shares no connection with the one before. So a connection may be trusted when the
        proven process still answers after it was made; an engine of our own has an address of its own.
        """
        if self.own:
            return
        made = self.client.connections_made
        async with self._checking:
            if self._checked >= made:
                return
            made = self.client.connections_made
            await self.check_boot()
            self._checked = made


class EngineLink:
    """Holds the proven engine. Requests get it or a refusal; nothing in between."""

    def __init__(self, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._metrics = metrics
        self._log = log
        self._engine: ProvenEngine | None = None
        self.reason = "the engine is starting"
        """Why there is no engine, for operators."""

    @property
    def current(self) -> ProvenEngine | None:
        """The proven engine, or None."""
        return self._engine

    def require(self) -> ProvenEngine:
        """The proven engine; refuses the request when there is none."""
        if self._engine is None:
            raise EngineNotReady("the engine is not ready; try again in a moment")
        return self._engine

    async def prove(
        self,
        client: EngineClient,
        own: bool,
        prepare: Callable[[ProvenEngine], Awaitable[None]],
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Attest and test the engine, let ``prepare`` load the plans, then open it for requests.

        Raises `EngineError` when any of it fails; there is no engine then.
        """
        self.lose("the engine is being proven")
        attested = await client.attest()
        self._metrics.engine_up.set(1)
        progress("Proving the engine: self-test through the running model")
        await client.selftest()
        engine = ProvenEngine(
            client, attested.boot_id, attested.spec(), tuple(await client.models()), attested, own
        )
        progress("Loading policies")
        await prepare(engine)
        # The self-test and the plans must be those of one and the same process.
        await engine.check_boot()
        self._engine = engine
        self.reason = ""
        self._metrics.ready.set(1)
        self._log.info(
            "engine_ready",
            boot_id=attested.boot_id,
            model=engine.spec.name,
            fingerprint=engine.spec.fingerprint[:12],
            plugin=attested.plugin_version,
            vllm=attested.vllm_version,
        )

    def lose(self, reason: str, *, gone: bool = False, meant: bool = False) -> None:
        """Close the engine to requests; ``gone``: it answers no more, ``meant``: we end it ourselves."""
        if self._engine is not None and not meant:
            self._log.error("engine_lost", reason=reason)
        self._engine = None
        self.reason = reason
        self._metrics.ready.set(0)
        if gone:
            self._metrics.engine_up.set(0)
