"""One engine of the fleet. It gets requests only while it is proven to steer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from structlog.typing import FilteringBoundLogger

from interpretops.engine_api import Attestation
from interpretops.errors import EngineError
from interpretops.plan import ModelSpec
from interpretops.special_tokens import SpecialTokens
from proxy.engines.circuit_breaker import Breaker
from proxy.engines.client import EngineClient
from proxy.observe.metrics import Metrics


class EngineReplacedError(EngineError):
    """The process behind the address is not the one that was proven."""


@dataclass(eq=False)
class ProvenEngine:
    """An engine whose plugin has attested itself and passed its self-test."""

    name: str
    client: EngineClient
    boot_id: str
    spec: ModelSpec
    special: SpecialTokens
    """Special tokens of its tokenizer, which callers may not put into a prompt."""
    models: tuple[dict[str, Any], ...]
    """The engine's model list."""
    attested: Attestation
    own: bool
    """Whether this gateway started it, so that no other process can ever answer at its address."""
    resident: dict[str, str] = field(default_factory=dict)
    """Revision to the digest that every rank attested. The engine gets requests of these revisions only."""
    unfreed: set[str] = field(default_factory=set)
    """Unneeded revisions that it may still hold, because a load or retire call got no answer."""

    reload_needed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the engine refused a revision that it had attested, so that it must be loaded again."""

    def mark_missing(self, revision: str) -> None:
        """Send no more requests of a revision that the engine reports as not resident."""
        if self.resident.pop(revision, None) is not None:
            self.reload_needed.set()

    @property
    def served(self) -> frozenset[str]:
        """The model names that the engine serves."""
        return frozenset(model["id"] for model in self.models)

    _checking: asyncio.Lock = field(default_factory=asyncio.Lock)
    _checked: int = 0

    async def check_boot(self) -> None:
        """Raise unless the process behind the address is still the one that was proven."""
        self._check_boot(await self.client.attest())

    def _check_boot(self, attested: Attestation) -> None:
        if attested.boot_id != self.boot_id:
            raise EngineReplacedError(
                f"engine was restarted: boot {attested.boot_id!r} instead of {self.boot_id!r}"
            )

    async def check_resident(self) -> list[str]:
        """Remove from `resident` what the engine no longer attests, and return it. Raises as `check_boot`."""
        known = dict(self.resident)
        attested = await self.client.attest()
        self._check_boot(attested)
        ranks = [rank for group in attested.engines for rank in group.ranks]
        lost = [
            revision
            for revision, digest in known.items()
            if not ranks or any(rank.resident.get(revision) != digest for rank in ranks)
        ]
        return [revision for revision in lost if self.resident.pop(revision, None) is not None]

    async def check_connections(self) -> None:
        """Raise unless every connection made so far leads to the process that was proven.

        A restarted engine shares no connection with its predecessor. So a connection is trusted if the proven
        process still answers after it was made. An engine that we started has a private address.
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
    """Holds an engine once it is proven, and counts its requests."""

    def __init__(
        self,
        name: str,
        breaker: Breaker,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self.name = name
        """Its address, or `local`; a label in metrics."""
        self.breaker = breaker
        self.outstanding = 0
        """Requests of this gateway in progress at the engine."""
        self.last_leased = 0
        """Sequence number of its last lease; larger is later."""
        self._metrics = metrics
        self._log = log
        self.joined: ProvenEngine | None = None
        """The engine once it has passed its self-test, even while policies are still loading."""
        self._former: ProvenEngine | None = None
        """The engine lost most recently, with the plans it may still hold for us."""
        self.current: ProvenEngine | None = None
        """The engine, while it takes requests; otherwise None."""
        self.reason = "the engine is starting"
        """Why `current` is None, for operators."""
        self.answers = False
        """Whether it has attested itself and still responds."""
        metrics.engine_unattested.labels(name)
        metrics.engine_up.labels(name).set_function(lambda: self.answers)
        metrics.engine_ready.labels(name).set_function(lambda: self.current is not None)
        metrics.engine_outstanding.labels(name).set_function(lambda: self.outstanding)
        metrics.engine_breaker_open.labels(name).set_function(lambda: self.breaker.state != "closed")

    async def prove(
        self,
        client: EngineClient,
        own: bool,
        prepare: Callable[[ProvenEngine], Awaitable[None]],
        progress: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Attest and self-test the engine, load plans with ``prepare``, then open it for requests.

        Raises `EngineError` if any step fails; the engine then takes no requests.
        """
        self.lose("the engine is being proven")
        attested = await client.attest()
        self.answers = True
        progress("Running the engine's self-test through the model")
        await client.selftest()
        engine = ProvenEngine(
            *(self.name, client, attested.boot_id, attested.spec(), attested.special()),
            *(tuple(await client.models()), attested, own),
        )
        if self._former is not None:
            # It may be the same process as before and still hold plans retired in the meantime.
            held = {*self._former.resident, *self._former.unfreed}
            engine.unfreed |= held & attested.revisions()
        progress("Loading policies")
        self.joined = engine
        await prepare(engine)
        # The self-test and the plans must be those of one and the same process.
        await engine.check_boot()
        self.current = engine
        self.reason = ""
        self.breaker.worked()
        self._log.info(
            "engine_ready",
            engine=self.name,
            boot_id=attested.boot_id,
            model=engine.spec.name,
            fingerprint=engine.spec.fingerprint[:12],
            plugin=attested.plugin_version,
            vllm=attested.vllm_version,
        )

    def lose(self, reason: str, *, gone: bool = False, planned: bool = False) -> None:
        """Stop sending requests. ``gone``: it no longer responds; ``planned``: we are stopping it."""
        if self.current is not None and not planned:
            self._log.error("engine_lost", engine=self.name, reason=reason)
        self._former = self.joined or self._former
        self.current = self.joined = None
        self.reason = reason
        self.answers = self.answers and not gone

    def forget(self) -> None:
        """Remove the engine from the metrics: it is no longer listed."""
        metrics = self._metrics
        metrics.engine_up.remove(self.name)
        metrics.engine_ready.remove(self.name)
        metrics.engine_outstanding.remove(self.name)
        metrics.engine_breaker_open.remove(self.name)
        metrics.engine_unattested.remove(self.name)
        metrics.engine_retries.remove_by_labels({"engine": self.name})

    def summary(self) -> dict[str, Any]:
        """For the admin API."""
        engine = self.joined
        return {
            "name": self.name,
            "ready": self.current is not None,
            "reason": self.reason or None,
            "breaker": self.breaker.state,
            "outstanding": self.outstanding,
            "boot_id": None if engine is None else engine.boot_id,
            "revisions": [] if engine is None else sorted(engine.resident),
        }
