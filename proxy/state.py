"""State shared by the gateway's request handlers: settings, engines, policies and metrics."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web
from multidict import CIMultiDictProxy
from structlog.typing import FilteringBoundLogger

from interpretops.settings import Settings
from proxy.engines.fleet import Fleet
from proxy.errors import UnknownModel
from proxy.http.stall_guard import StallGuard
from proxy.http.tls import TlsListeners
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Readiness
from proxy.observe.supervisor import Supervisor
from proxy.observe.tracing import Tracing
from proxy.observe.transcripts import Transcripts
from proxy.policies.binding import Caller, read_caller
from proxy.policies.catalogue import Catalogue
from proxy.policies.drift import Drift
from proxy.policies.intake import Intake
from proxy.tenants.access import Access, Identity
from proxy.tenants.limits import Limiter
from proxy.tenants.usage_billing import UsageBilling
from proxy.verification.canary import Canary
from proxy.verification.shadow import Shadows


@dataclass(frozen=True)
class Gateway:
    """The components that handlers use."""

    settings: Settings
    fleet: Fleet
    catalogue: Catalogue
    intake: Intake
    access: Access
    limiter: Limiter
    billing: UsageBilling
    stall_guard: StallGuard
    shadows: Shadows
    canary: Canary
    drift: Drift
    transcripts: Transcripts
    audit: AuditLog | None
    tracing: Tracing
    tls_listeners: TlsListeners
    readiness: Readiness
    supervisor: Supervisor
    metrics: Metrics
    log: FilteringBoundLogger

    def caller(self, route: str, headers: CIMultiDictProxy[str], model: str, identity: Identity) -> Caller:
        """The properties of a request that bindings match. Refuses a model that this caller may not use."""
        served = self.fleet.require().served
        known = (*served, *(alias.name for alias in self.settings.aliases))
        names = {name for name in known if identity.may_name(name)}
        return read_caller(route, headers, model, names, identity.tenant.id, identity.key)

    def engine_model(self, name: str) -> str:
        """The engine's name for the model name or alias that a caller used."""
        served = self.fleet.require().served
        if name in served:
            return name
        alias = next(alias for alias in self.settings.aliases if alias.name == name)
        if alias.model is None:
            return min(served)
        if alias.model not in served:
            raise UnknownModel(
                f"model {name!r} is an alias of a model that the engine does not serve", param="model"
            )
        return alias.model


IDENTITY: web.RequestKey[Identity] = web.RequestKey("identity", Identity)
GATEWAY: web.AppKey[Gateway] = web.AppKey("gateway", Gateway)
