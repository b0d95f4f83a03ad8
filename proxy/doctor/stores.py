"""Persistent state: the audit log, and Redis for shared limits."""

from __future__ import annotations

from collections.abc import AsyncIterator

from interpretops.errors import InterpretOpsError
from interpretops.records.audit_chain import verify
from interpretops.settings import Settings
from proxy.doctor.finding import Finding, fault, ok
from proxy.tenants.shared_limits import ping


async def check_stores(settings: Settings) -> AsyncIterator[Finding]:
    """Check that the audit log is intact and Redis responds."""
    log = settings.audit.path
    if log is None:
        yield ok("audit log", "turned off")
    elif not log.exists():
        yield ok("audit log", f"{log} will be created")
    else:
        found = verify(log)
        if found.faults:
            for finding in fault("audit log", f"{log}: {found.faults[0]}; see `mechctl audit verify`"):
                yield finding
        else:
            yield ok("audit log", f"{log}: {found.records} records, intact")
    if settings.limits.redis_url is not None:
        try:
            await ping(settings.limits)
        except (InterpretOpsError, OSError) as error:
            for finding in fault("Redis", f"limits.redis_url: {error}; start it, or remove the setting"):
                yield finding
        else:
            yield ok("Redis", "responds")
