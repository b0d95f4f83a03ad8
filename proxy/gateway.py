"""Puts the gateway together: engines, one catalogue, two apps, and the services that keep them alive."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from interpretops import __version__
from interpretops.settings import Settings
from proxy.admin.app import make_admin_app
from proxy.engines.fleet import Fleet
from proxy.engines.fleet_loop import FleetLoop
from proxy.engines.link import ProvenEngine
from proxy.engines.loop import Engine, Surroundings
from proxy.http.stall_guard import StallWatch
from proxy.http.tls import Doorways
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Readiness
from proxy.observe.supervisor import Supervisor
from proxy.observe.tracing import Tracing
from proxy.observe.transcripts import Transcripts
from proxy.policies.binding import demanded, joint_mandatory
from proxy.policies.binding_names import NameCheck
from proxy.policies.catalogue import Catalogue
from proxy.policies.drift import Drift
from proxy.policies.intake import Intake
from proxy.relay.public_app import make_public_app
from proxy.services import Services
from proxy.state import Gateway
from proxy.tenants.access import Access
from proxy.tenants.budget import Budgets
from proxy.tenants.limits import Limiter, counted_together
from proxy.tenants.shared_limits import SharedCounts
from proxy.tenants.usage_billing import Settlements
from proxy.verification.canary import Canary
from proxy.verification.shadow import Shadows


@dataclass(frozen=True)
class Apps:
    """The two apps of one gateway, what keeps its engines, and all that runs beside requests."""

    public: web.Application
    admin: web.Application
    gateway: Gateway
    engine_loop: FleetLoop
    services: Services


def make_app(
    settings: Settings,
    make_engine: Callable[[str | None], Engine],
    log: FilteringBoundLogger,
    progress: Callable[[str], None] = lambda line: None,
    doorways: Doorways | None = None,
) -> Apps:
    """Both apps over one state; the public one's start starts the engines, its cleanup ends them.

    doorways  the TLS of the listeners, to be read again when it changes

    Raises `ConfigError`.
    """
    metrics = Metrics()
    readiness = Readiness(metrics, log)
    supervisor = Supervisor(metrics, log)
    fleet = Fleet(settings.gateway, metrics, log)
    paths = settings.paths
    audit = _open_audit(settings, metrics, log, supervisor)
    record = _nothing if audit is None else audit.append
    catalogue = Catalogue(
        paths.policies,
        demanded(settings.bindings),
        fleet,
        metrics,
        log,
        supervisor,
        joint=joint_mandatory(settings.bindings),
        require_cards=settings.policies.require_cards,
        record=record,
    )
    intake = Intake(paths.policies, paths.artifacts, catalogue, fleet, metrics, log)
    access = Access(settings, metrics, log)
    names = NameCheck(settings, lambda: access.keys, lambda: _served(fleet), catalogue.entries, metrics, log)
    budgets, shared = _open_accounts(settings, access, metrics, log)
    gateway = Gateway(
        settings=settings,
        fleet=fleet,
        catalogue=catalogue,
        intake=intake,
        access=access,
        limiter=Limiter(budgets, shared=shared),
        settlements=Settlements(metrics, supervisor),
        stalls=StallWatch(settings.gateway, metrics, log),
        shadows=Shadows(
            settings.policies.shadow_share,
            catalogue.residency,
            settings.gateway.request_timeout_s,
            metrics,
            log,
            supervisor,
        ),
        canary=Canary(settings, catalogue, fleet, metrics, log, record),
        transcripts=Transcripts(settings, metrics, log),
        drift=Drift(paths.state, catalogue.entries, metrics),
        audit=audit,
        tracing=Tracing(settings.tracing, __version__),
        doorways=doorways or Doorways(),
        readiness=readiness,
        supervisor=supervisor,
        metrics=metrics,
        log=log,
    )
    for part in (fleet, catalogue, supervisor, access, audit, shared, names):
        if part is not None:
            readiness.add(part.not_ready)

    async def prepare(engine: ProvenEngine) -> None:
        names.check_engine(engine.served)
        await intake.prepare(engine)
        names.note_policies()

    around = Surroundings(
        settings=settings,
        make=make_engine,
        prepare=prepare,
        restore=intake.restore,
        metrics=metrics,
        log=log,
        progress=progress,
        holder=secrets.token_hex(8),
    )
    loop = FleetLoop(fleet, around, supervisor)
    services = Services(gateway, loop, budgets, shared)

    async def run_services(_app: web.Application) -> AsyncIterator[None]:
        async with services.running():
            yield

    public = make_public_app(gateway)
    public.cleanup_ctx.append(run_services)
    return Apps(public, make_admin_app(gateway), gateway, loop, services)


def _open_accounts(
    settings: Settings, access: Access, metrics: Metrics, log: FilteringBoundLogger
) -> tuple[Budgets, SharedCounts | None]:
    """Where use is counted: in Redis where settings name one, else in files of this gateway's own."""
    shared = None
    if settings.limits.redis_url is not None:
        limited = all(counted_together(tenant.limits) for tenant in access.callers)
        shared = SharedCounts(settings.limits, metrics, log, for_everybody=limited)
    budgeted = any(tenant.limits.token_budget is not None for tenant in settings.tenants)
    alone = budgeted and shared is None
    return Budgets(settings.paths.state.expanduser() if alone else None, metrics, log), shared


def _nothing(_event: str, **_fields: object) -> None:
    """What happens to records without an audit log."""


def _open_audit(
    settings: Settings, metrics: Metrics, log: FilteringBoundLogger, supervisor: Supervisor
) -> AuditLog | None:
    if settings.audit.path is None:
        return None
    return AuditLog(settings.audit.path, settings.audit, metrics, log, supervisor)


def _served(fleet: Fleet) -> frozenset[str] | None:
    """The names under which the engines serve the model; None while there is none."""
    return None if fleet.current is None else fleet.current.served
