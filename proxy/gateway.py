"""Puts the gateway together: engines, one catalogue, two apps, and the tasks that keep them alive."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from interpretops import __version__
from interpretops.errors import EngineError
from interpretops.settings import Settings
from proxy.admin.app import make_admin_app
from proxy.admin.watch import hear_changes, watch_certificates, watch_keys, watch_policies
from proxy.engines.fleet import Fleet
from proxy.engines.fleet_loop import FleetLoop
from proxy.engines.link import ProvenEngine
from proxy.engines.loop import Engine, Surroundings
from proxy.http.stall_guard import StallWatch
from proxy.http.tls import Doorways
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Readiness
from proxy.observe.supervisor import Supervisor, end
from proxy.observe.tracing import Tracing
from proxy.observe.transcripts import Transcripts
from proxy.policies.binding import demanded, joint_mandatory
from proxy.policies.binding_names import NameCheck
from proxy.policies.catalogue import Catalogue
from proxy.policies.drift import Drift
from proxy.policies.intake import Intake
from proxy.relay.public_app import make_public_app
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
    """The two apps of one gateway, and what keeps its engines."""

    public: web.Application
    admin: web.Application
    gateway: Gateway
    engine_loop: FleetLoop


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
    budgeted = any(tenant.limits.token_budget is not None for tenant in settings.tenants)
    shared = None
    if settings.limits.redis_url is not None:
        limited = all(counted_together(tenant.limits) for tenant in access.callers)
        shared = SharedCounts(settings.limits, metrics, log, for_everybody=limited)
    alone = budgeted and shared is None
    budgets = Budgets(paths.state.expanduser() if alone else None, metrics, log)
    settlements = Settlements(metrics, supervisor)
    stalls = StallWatch(settings.gateway, metrics, log)
    shadows = Shadows(
        settings.policies.shadow_share,
        catalogue.residency,
        settings.gateway.request_timeout_s,
        metrics,
        log,
        supervisor,
    )
    canary = Canary(settings, catalogue, fleet, metrics, log, record)
    gateway = Gateway(
        settings=settings,
        fleet=fleet,
        catalogue=catalogue,
        intake=intake,
        access=access,
        limiter=Limiter(budgets, shared=shared),
        settlements=settlements,
        stalls=stalls,
        shadows=shadows,
        canary=canary,
        transcripts=(transcripts := Transcripts(settings, metrics, log)),
        drift=Drift(paths.state, catalogue.entries, metrics),
        audit=audit,
        tracing=(tracing := Tracing(settings.tracing, __version__)),
        doorways=(doorways := doorways or Doorways()),
        readiness=readiness,
        supervisor=supervisor,
        metrics=metrics,
        log=log,
    )
    readiness.add(fleet.not_ready)
    readiness.add(catalogue.not_ready)
    readiness.add(supervisor.not_ready)
    readiness.add(access.not_ready)
    if audit is not None:
        readiness.add(audit.not_ready)
    if shared is not None:
        readiness.add(shared.not_ready)
    readiness.add(names.not_ready)

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

    async def keep_readiness(_app: web.Application) -> AsyncIterator[None]:
        task = supervisor.keep("readiness", readiness.keep)
        yield
        await end(task)

    async def keep_engines(_app: web.Application) -> AsyncIterator[None]:
        loop.task = supervisor.keep("engines", loop.run, ends_with=(EngineError,))
        yield
        await end(loop.task)
        await loop.close()
        await catalogue.residency.close()

    async def keep_watch(_app: web.Application) -> AsyncIterator[None]:
        changed = asyncio.Event()
        tasks = [
            supervisor.keep("policies", lambda alive: watch_policies(changed, intake, fleet, log, alive)),
            supervisor.keep(
                "policy notifications", lambda alive: hear_changes(paths.policies, changed, alive)
            ),
        ]
        yield
        await end(*tasks)

    async def keep_tracing(_app: web.Application) -> AsyncIterator[None]:
        yield
        await tracing.close()

    async def keep_transcripts(_app: web.Application) -> AsyncIterator[None]:
        tasks = [
            supervisor.keep("transcripts", transcripts.run),
            supervisor.keep("retention", transcripts.sweep),
        ]
        yield
        await end(*tasks)
        await transcripts.close()

    async def keep_canary(_app: web.Application) -> AsyncIterator[None]:
        task = supervisor.keep("canary", canary.keep)
        yield
        await end(task)

    public = make_public_app(gateway)
    public.cleanup_ctx.append(keep_tracing)
    public.cleanup_ctx.append(keep_engines)
    public.cleanup_ctx.append(keep_readiness)

    async def keep_keys(_app: web.Application) -> AsyncIterator[None]:
        task = supervisor.keep("keys", lambda alive: watch_keys(access, alive))
        yield
        await end(task)

    async def keep_certificates(_app: web.Application) -> AsyncIterator[None]:
        task = supervisor.keep(
            "certificates", lambda alive: watch_certificates(doorways, metrics, log, alive)
        )
        yield
        await end(task)

    async def keep_audit(_app: web.Application) -> AsyncIterator[None]:
        assert audit is not None
        audit.append("gateway_started", version=__version__)
        task = supervisor.keep("audit", audit.keep)
        yield
        await end(task)
        audit.append("gateway_stopped")
        await audit.close()

    async def keep_strays(_app: web.Application) -> AsyncIterator[None]:
        running = asyncio.get_running_loop()
        before = running.get_exception_handler()
        running.set_exception_handler(supervisor.stray)
        yield
        running.set_exception_handler(before)

    public.cleanup_ctx.insert(0, keep_strays)
    if audit is not None:
        # First to begin and last to end: all else may have something to record.
        public.cleanup_ctx.insert(0, keep_audit)

    async def keep_budgets(_app: web.Application) -> AsyncIterator[None]:
        tasks = [supervisor.keep("budgets", budgets.keep)]
        if shared is not None:
            tasks.append(supervisor.keep("shared limits", shared.keep))
        yield
        await end(*tasks)
        await shadows.close()
        await settlements.close()
        budgets.close()
        if shared is not None:
            await shared.close()

    # Cleaned up in reverse: after all requests have ended, while the engine still knows their receipts.
    public.cleanup_ctx.append(keep_budgets)
    public.cleanup_ctx.append(keep_transcripts)
    if canary.wanted:
        public.cleanup_ctx.append(keep_canary)
    if access.wanted:
        public.cleanup_ctx.append(keep_keys)
    public.cleanup_ctx.append(keep_certificates)
    if settings.gateway.watch_policies:
        public.cleanup_ctx.append(keep_watch)
    return Apps(public, make_admin_app(gateway), gateway, loop)


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
