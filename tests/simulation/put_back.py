"""Past faults of the gateway, reintroduced one at a time: the simulation must find each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import proxy.admin.app
import proxy.engines.link
import proxy.observe.audit_log
import proxy.observe.supervisor
import proxy.openai_api.request_size
import proxy.policies.catalogue
import proxy.relay.public_app
import proxy.relay.relay
import proxy.tenants.access
from simulation.patches import put


def _task_ends_with_its_first_error(stack: contextlib.ExitStack) -> None:
    """One unexpected exception silently ended the watcher of policies or keys."""

    kept = proxy.observe.supervisor.Supervisor._keep

    async def keep(self: Any, name: str, run: Any, ends_with: tuple[type[Exception], ...]) -> None:
        if name not in ("policies", "keys"):
            await kept(self, name, run, ends_with)
            return
        try:
            await run(lambda: None)
        except Exception:
            return

    put(stack, proxy.observe.supervisor.Supervisor, "_keep", keep)


def _deleted_keys_work(stack: contextlib.ExitStack) -> None:
    """Deleting the key file left its keys in force forever."""
    refresh = proxy.tenants.access.Access.refresh

    def refresh_unless_gone(self: proxy.tenants.access.Access) -> None:
        if self._path is not None and self._path.exists():
            refresh(self)

    put(stack, proxy.tenants.access.Access, "refresh", refresh_unless_gone)


def _prompts_are_not_counted(stack: contextlib.ExitStack) -> None:
    """A request of many prompts counted as one."""
    size_of = proxy.openai_api.request_size.size_of

    def size_of_one(body: Any, size_bytes: int) -> proxy.openai_api.request_size.Size:
        size = size_of(body, size_bytes)
        return proxy.openai_api.request_size.Size(1, 1, size.read, size.stated)

    put(stack, proxy.relay.public_app, "size_of", size_of_one)


def _ready_without_audit_log(stack: contextlib.ExitStack) -> None:
    """Readiness was positive while every request was refused because the audit log's disk was full."""
    put(stack, proxy.observe.audit_log.AuditLog, "not_ready", lambda _self: iter(()))


def _removed_audit_log_is_written_on(stack: contextlib.ExitStack) -> None:
    """After `rm` of the audit log, records went into the deleted file."""
    put(stack, proxy.observe.audit_log.AuditLog, "_continue_if_displaced", lambda _self: None)


def _part_is_proof(stack: contextlib.ExitStack) -> None:
    """A receipt of one request and three tokens proved a thousand prompts."""

    def fault(receipt: Any, required: str, _size: Any, _told: Any) -> str | None:
        if receipt is None or receipt.revision != required or receipt.requests < 1:
            return "no receipt for it"
        return None if required == "none" or receipt.tokens_evaluated else "nothing was evaluated"

    put(stack, proxy.relay.relay, "receipt_fault", fault)


def _lost_revision_is_502(stack: contextlib.ExitStack) -> None:
    """An engine that had lost a revision caused 502, as if it had failed."""
    put(stack, proxy.relay.relay, "refusal_code", lambda _answer: None)


def _promotion_moves(stack: contextlib.ExitStack) -> None:
    """A promotion activated whatever candidate was there, not the reviewed one."""
    put(stack, proxy.admin.app, "_check_named", lambda *_: None)
    put(stack, proxy.policies.catalogue, "_check_unchanged", lambda *_: None)


def _rejoined_engine_keeps_rows(stack: contextlib.ExitStack) -> None:
    """An engine lost for a while, without a restart, kept plans retired meanwhile forever."""
    prove = proxy.engines.link.EngineLink.prove

    async def prove_anew(self: proxy.engines.link.EngineLink, *rest: Any) -> None:
        self._former = None
        await prove(self, *rest)

    put(stack, proxy.engines.link.EngineLink, "prove", prove_anew)


PUT_BACK: dict[str, Callable[[contextlib.ExitStack], None]] = {
    "task_ends_with_its_first_error": _task_ends_with_its_first_error,
    "deleted_keys_work": _deleted_keys_work,
    "prompts_are_not_counted": _prompts_are_not_counted,
    "ready_without_audit_log": _ready_without_audit_log,
    "removed_audit_log_is_written_on": _removed_audit_log_is_written_on,
    "part_is_proof": _part_is_proof,
    "lost_revision_is_502": _lost_revision_is_502,
    "promotion_moves": _promotion_moves,
    "rejoined_engine_keeps_rows": _rejoined_engine_keeps_rows,
}
"""By name."""
