"""The engines behind the gateway. Each request goes to the least busy one that holds its revision."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from types import TracebackType
from typing import Self

from structlog.typing import FilteringBoundLogger

from interpretops.settings import GatewaySettings
from proxy.engines.circuit_breaker import Breaker
from proxy.engines.link import EngineLink, ProvenEngine
from proxy.errors import EngineNotReady
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Reason


class Fleet:
    """All engines by name. Choosing one for a request never waits."""

    def __init__(self, settings: GatewaySettings, metrics: Metrics, log: FilteringBoundLogger) -> None:
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._leases = count(1)
        self.links: dict[str, EngineLink] = {}

    def add(self, name: str) -> EngineLink:
        """Add a link for an engine that will join."""
        breaker = Breaker(self._settings.breaker_failures, self._settings.breaker_open_s)
        link = EngineLink(name, breaker, self._metrics, self._log)
        self.links[name] = link
        return link

    def remove(self, name: str) -> EngineLink:
        """Send no more requests to an engine. Requests in progress continue."""
        link = self.links.pop(name)
        link.forget()
        return link

    @property
    def joined(self) -> list[ProvenEngine]:
        """The proven engines, including those that are still loading policies."""
        return [link.joined for link in self.links.values() if link.joined is not None]

    @property
    def open(self) -> Iterator[ProvenEngine]:
        """The engines that take requests."""
        return (link.current for link in self.links.values() if link.current is not None)

    @property
    def current(self) -> ProvenEngine | None:
        """Any engine that takes requests: all of them serve the same model under the same names."""
        return next(self.open, None)

    @property
    def reason(self) -> str:
        """Why there is no engine, for the log and the admin API."""
        reasons = {link.name: link.reason for link in self.links.values()}
        if len(reasons) == 1:
            return next(iter(reasons.values()))
        return "; ".join(f"{name}: {why}" for name, why in reasons.items()) or "no engine is known yet"

    def not_ready(self) -> Iterator[Reason]:
        """Why no request can be sent to any engine."""
        if self.current is None:
            yield Reason("engine_not_ready", self.reason)
        elif not any(link.breaker.allows for link in self.links.values() if link.current is not None):
            yield Reason("engines_left_alone", "several requests in a row failed at every engine")

    def require(self) -> ProvenEngine:
        """As `current`. Raises `EngineNotReady` when there is none."""
        engine = self.current
        if engine is None:
            raise EngineNotReady("the engine is not ready; try again in a moment")
        return engine

    def lease(self, revision: str | None) -> Lease:
        """Lease an engine for a request under ``revision``, if any. Raises `EngineNotReady`."""
        link = self._choose(revision, ())
        if link is None:
            self.require()
            raise EngineNotReady("no engine can accept the request now; try again in a moment")
        return Lease(self, link, revision)

    def choose_another(self, revision: str | None, tried: list[EngineLink], why: str) -> EngineLink | None:
        """An engine other than those tried, if there is one."""
        link = self._choose(revision, tried)
        if link is not None:
            self._metrics.engine_retries.labels(tried[-1].name, why).inc()
        return link

    def _choose(self, revision: str | None, tried: list[EngineLink] | tuple[()]) -> EngineLink | None:
        best: EngineLink | None = None
        for link in self.links.values():
            engine = link.current
            if engine is None or link in tried or not link.breaker.allows:
                continue
            if revision is not None and revision not in engine.resident:
                continue
            # Among equally busy engines take the least recently used: gateways must not all pick the first.
            if best is None or (link.outstanding, link.last_leased) < (best.outstanding, best.last_leased):
                best = link
        if best is not None:
            best.last_leased = next(self._leases)
        return best


class Lease:
    """Counts one request as outstanding at an engine, and can move it to another engine."""

    __slots__ = ("_fleet", "_revision", "_tried", "engine", "link")

    def __init__(self, fleet: Fleet, link: EngineLink, revision: str | None) -> None:
        self._fleet = fleet
        self._revision = revision
        self._tried: list[EngineLink] = []
        self._take(link)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.link.outstanding -= 1
        self.link.breaker.undecided()

    def try_another(self, why: str) -> bool:
        """Move to another engine, if there is one. Only while nothing has been sent to the client."""
        self._tried.append(self.link)
        link = self._fleet.choose_another(self._revision, self._tried, why)
        if link is None:
            return False
        self.link.outstanding -= 1
        self._take(link)
        return True

    def _take(self, link: EngineLink) -> None:
        engine = link.current
        assert engine is not None
        self.link, self.engine = link, engine
        link.outstanding += 1
        link.breaker.begin()
