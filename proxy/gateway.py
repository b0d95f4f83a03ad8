"""Assembles the gateway: engines, the policy catalogue, two apps, and background services."""

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
from proxy.engines.loop import Engine, EngineDependencies
from proxy.http.stall_guard import StallGuard
from proxy.http.tls import TlsListeners
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Readiness
from proxy.observe.supervisor import Supervisor
from proxy.observe.tracing import Tracing
from proxy.observe.transcripts import Transcripts
from proxy.policies.binding import joint_mandatory, required_policies
from proxy.policies.binding_names import NameCheck
from proxy.policies.catalogue import Catalogue
from proxy.policies.drift import Drift
from proxy.policies.intake import Intake
from proxy.relay.public_app import make_public_app
from proxy.services import Services
from proxy.state import Gateway
from proxy.tenants.access import Access
from proxy.tenants.budget import Budgets
from proxy.tenants.limits import Limiter, has_shared_limits
from proxy.tenants.shared_limits import SharedCounts
from proxy.tenants.usage_billing import UsageBilling
from proxy.verification.canary import Canary
from proxy.verification.shadow import Shadows


@dataclass(frozen=True)
class Apps:
    """The two apps of one gateway, its engine loop, and its background services."""

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
    tls_listeners: TlsListeners | None = None,
) -> Apps:
    """Build both apps over shared state. Starting the public app starts the engines; its cleanup stops them.

    tls_listeners  TLS of the listeners, reloaded when its files change

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
        required_policies(settings.bindings),
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
    budgets, shared = _open_usage_counters(settings, access, metrics, log)
    gateway = Gateway(
        settings=settings,
        fleet=fleet,
        catalogue=catalogue,
        intake=intake,
        access=access,
        limiter=Limiter(budgets, shared=shared),
        billing=UsageBilling(metrics, supervisor),
        stall_guard=StallGuard(settings.gateway, metrics, log),
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
        tls_listeners=tls_listeners or TlsListeners(),
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

    deps = EngineDependencies(
        settings=settings,
        make=make_engine,
        prepare=prepare,
        restore=intake.restore,
        metrics=metrics,
        log=log,
        progress=progress,
        holder=secrets.token_hex(8),
    )
    loop = FleetLoop(fleet, deps, supervisor)
    services = Services(gateway, loop, budgets, shared)

    async def run_services(_app: web.Application) -> AsyncIterator[None]:
        async with services.running():
            yield

    public = make_public_app(gateway)
    public.cleanup_ctx.append(run_services)
    return Apps(public, make_admin_app(gateway), gateway, loop, services)


def _open_usage_counters(
    settings: Settings, access: Access, metrics: Metrics, log: FilteringBoundLogger
) -> tuple[Budgets, SharedCounts | None]:
    """Where usage is counted: in Redis if the settings name one, otherwise in this gateway's own file."""
    shared = None
    if settings.limits.redis_url is not None:
        limited = all(has_shared_limits(tenant.limits) for tenant in access.callers)
        shared = SharedCounts(settings.limits, metrics, log, for_everybody=limited)
    budgeted = any(tenant.limits.token_budget is not None for tenant in settings.tenants)
    alone = budgeted and shared is None
    return Budgets(settings.paths.state.expanduser() if alone else None, metrics, log), shared


def _nothing(_event: str, **_fields: object) -> None:
    """Discards records when there is no audit log."""


def _open_audit(
    settings: Settings, metrics: Metrics, log: FilteringBoundLogger, supervisor: Supervisor
) -> AuditLog | None:
    if settings.audit.path is None:
        return None
    return AuditLog(settings.audit.path, settings.audit, metrics, log, supervisor)


def _served(fleet: Fleet) -> frozenset[str] | None:
    """The model names that the engines serve; None while no engine is ready."""
    return None if fleet.current is None else fleet.current.served
