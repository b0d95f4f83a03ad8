"""What must hold after faults end: everything works, nothing is left behind, the audit log is correct."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from interpretops.records.audit_chain import log_files, verify
from simulation.asks import Ask
from simulation.engine import EngineModel
from simulation.scenario import CHAT, POLICIES, ROUTES
from steering_kernels.vllm_plugin.core.holders import LEASE_S

if TYPE_CHECKING:
    from simulation.world import World

_NOTICED_S = 7.0
"""Deadline for the gateway to notice that an engine was replaced."""
_READY_S = 240.0
_TAKEN_S = 12.0
"""Deadline for a file change to take effect."""
_REVOKED_S = 6.0
"""Deadline for a revoked key to stop working."""
_LIMITED = ("rate_limit_exceeded", "insufficient_quota")


class Aftermath:
    """Checks one world after its faults."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._fail = world.invariants.fail

    async def check(self) -> None:
        """Run all checks, in order."""
        world = self._world
        await asyncio.sleep(_NOTICED_S)
        if not await world.wait_until(world.ready, _READY_S):
            reasons = world.gateway.apps.gateway.readiness.reasons()
            self._fail(f"not ready {_READY_S:g} s after the last trouble: {reasons}")
        # Until their leases expire, rows of earlier gateways may fill the engines' tables.
        await world.wait_until(self._new_rows_fit, LEASE_S + 15)
        await self._changes_are_taken()
        await world.wait_until(world.ready, _READY_S)
        await self._everybody_is_served()
        await self._revoked_keys_open_nothing()
        for connection in world.clients.connections:
            if connection.open:
                connection.transport.close()
        await asyncio.sleep(4.0)
        # Rows held by an earlier gateway are freed when its lease expires.
        await world.wait_until(self._rows_are_right, LEASE_S + 15)
        self._nothing_is_left()
        world.invariants.gateway = None
        await world.gateway.stop()
        await asyncio.sleep(1.0)
        self._no_task_is_left()
        self._audit_is_true()

    async def _changes_are_taken(self) -> None:
        world = self._world
        before = {policy: self._active(policy) for policy in POLICIES}
        world.files.mend()
        taken = await world.wait_until(
            lambda: all(self._active(policy) not in (None, old) for policy, old in before.items()), _TAKEN_S
        )
        if not taken:
            stuck = [policy for policy, old in before.items() if self._active(policy) in (None, old)]
            self._fail(f"a change of {', '.join(stuck)} is not taken within {_TAKEN_S:g} s")

    def _active(self, policy: str) -> str | None:
        entry = self._world.gateway.apps.gateway.catalogue.entries.get(policy)
        return None if entry is None or entry.active is None else entry.active.revision

    async def _everybody_is_served(self) -> None:
        world = self._world
        for tenant in world.scenario.tenants:
            for route in (CHAT, ROUTES[1]):
                ask = await world.clients.ask(world.clients.plain(tenant["id"], route))
                if ask.status != 200 and ask.error not in _LIMITED:
                    self._fail(f"an ordinary request of {ask.tenant} on {route} got {ask.status} {ask.error}")

    async def _revoked_keys_open_nothing(self) -> None:
        world = self._world
        if not world.scenario.keys:
            return
        if len(world.clients.asks) % 2:
            world.files.write_keys(without="free")
        else:
            world.files.delete_keys()
        await asyncio.sleep(_REVOKED_S)
        ask = await world.clients.ask(world.clients.plain("free", CHAT))
        if ask.status != 401:
            self._fail(f"a revoked key still gets {ask.status} {ask.error}")

    def _wanted(self) -> set[str]:
        catalogue = self._world.gateway.apps.gateway.catalogue
        shadows = {entry.shadow.revision for entry in catalogue.entries.values() if entry.shadow is not None}
        return shadows | {revision.revision for revision in catalogue.required_revisions}

    def _rows_are_right(self) -> bool:
        return all(set(engine.plans) == self._wanted() for engine in self._world.engines)

    def _new_rows_fit(self) -> bool:
        """Whether all active revisions fit in twice: new ones are loaded before old ones are freed."""
        return all(len(engine.plans) + len(self._wanted()) <= engine.room for engine in self._world.engines)

    def _nothing_is_left(self) -> None:
        world = self._world
        gateway, wanted = world.gateway.apps.gateway, self._wanted()
        for engine in world.engines:
            self._check_rows(engine, wanted)
        for link in gateway.fleet.links.values():
            if link.outstanding:
                self._fail(f"{link.outstanding} requests are still counted at {link.name}")
        for tenant, meter in gateway.limiter._meters.items():
            if meter.in_flight:
                self._fail(f"{meter.in_flight} requests of {tenant} are still counted")
        for revision in gateway.catalogue.required_revisions:
            if gateway.catalogue.residency.pins(revision):
                self._fail(f"{revision.label} is still pinned")

    def _check_rows(self, engine: EngineModel, wanted: set[str]) -> None:
        held = set(engine.plans)
        names = self._world.invariants.policy_of
        if held - wanted:
            left = ", ".join(f"{names.get(name, '?')}@{name[:12]}" for name in sorted(held - wanted))
            self._fail(f"{engine.name} holds rows that nobody needs: {left}")
        if wanted - held:
            self._fail(f"{engine.name} lacks {len(wanted - held)} revisions that serve")

    def _no_task_is_left(self) -> None:
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        if left:
            self._fail(
                f"{len(left)} tasks are left: {', '.join(sorted(task.get_name() for task in left))[:200]}"
            )

    def _audit_is_true(self) -> None:
        world = self._world
        if not world.scenario.audit:
            return
        path = world.files.folder / "audit.jsonl"
        found = verify(path)
        if world.invariants.log_deleted_at is None:
            for fault in found.faults[:3]:
                self._fail(f"audit log: {fault}")
        records: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for file in log_files(path):
            for line in file.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                except ValueError:
                    continue
                if record["event"] == "request":
                    records[record["request_id"]].append(record)
        asks = {ask.request_id: ask for ask in world.clients.asks}
        for request_id in records.keys() - asks.keys():
            self._fail(f"audit log: {request_id} was never asked")
        for request_id, ask in asks.items():
            self._check_records(ask, records[request_id])

    def _check_records(self, ask: Ask, records: list[dict[str, Any]]) -> None:
        name = f"audit log: {ask.request_id}"
        generated = [g for g in self._world.invariants.generations.values() if g.ask == str(ask.number)]
        if len(records) > 1:
            self._fail(f"{name} is recorded {len(records)} times")
        if not records:
            deleted_at = self._world.invariants.log_deleted_at
            if deleted_at is not None and ask.sent_at <= deleted_at:
                return
            if generated or (ask.whole and ask.status not in (401, 400, 408, 413)):
                times = len(generated)
                self._fail(f"{name} got {ask.status}, was generated {times} times, and is not recorded")
            return
        record = records[0]
        if ask.whole and record["status"] != ask.status:
            self._fail(f"{name} was answered with {ask.status}, but recorded with {record['status']}")
        for generation in generated:
            if record["revision"] != generation.sealed:
                self._fail(
                    f"{name} ran under {generation.sealed[:12]}, recorded is {record['revision'][:12]}"
                )
