"""What the gateway's handlers share: settings, the engine, the policies, the counters."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from interpretops.settings import Settings
from proxy.catalogue import Catalogue
from proxy.engine_link import EngineLink
from proxy.metrics import Metrics


@dataclass(frozen=True)
class Gateway:
    """Everything a handler may need."""

    settings: Settings
    link: EngineLink
    catalogue: Catalogue
    metrics: Metrics
    log: FilteringBoundLogger

    def not_ready(self) -> str | None:
        """Why requests cannot be served now, for operators; None when they can."""
        if self.link.current is None:
            return self.link.reason
        if missing := self.catalogue.missing:
            return f"bindings demand policies that are not loaded: {', '.join(missing)}"
        return None


GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway", Gateway)


@dataclass
class Trail:
    """What is known of a request by its end, for log and metrics. Never what it said."""

    request_id: str
    policy: str = "none"
    """Id of a policy in the catalogue, or `none`."""
    revision: str = "none"
    reason: str | None = None
    stream: bool = False
    engine_s: float = 0.0
    """Time spent waiting for the engine or the client's reading."""
    ttft_s: float | None = None
    began_at: float = 0.0


TRAIL: web.RequestKey[Trail] = web.RequestKey("trail", Trail)
