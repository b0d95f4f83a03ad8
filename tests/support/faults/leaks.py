"""Resources of the gateway and its engine that must be the same after a fault as before."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from faults.stand import Stand
from interpretops.engine_api import ATTEST_ROUTE, Attestation

MEMORY_MB = 24.0
"""Memory tolerance after the first requests: caches fill and heaps fragment."""
_SETTLE_S = 20.0


@dataclass(frozen=True)
class Figures:
    """One measurement."""

    tasks: int
    fds: int
    sockets: int
    threads: int
    """Threads, except idle pool threads: the pool fills up to its size and then stops growing. Pool threads
    stuck in their work count, and so does every other thread."""
    pool_idle: int
    """Idle pool threads, up to the pool's size."""
    engine_requests: int
    """Requests running and waiting in the engine."""
    revisions: int
    """Plans in the engine's tables."""
    in_flight: int
    """Requests in progress, as counted by the gateway."""
    memory_mb: float
    task_names: Counter[str] = field(compare=False, repr=False)

    def numbers(self) -> dict[str, float]:
        """All figures except names."""
        return {name: value for name, value in asdict(self).items() if name != "task_names"}

    def more_than(self, before: Figures) -> dict[str, Any]:
        """Figures that grew beyond their tolerance."""
        mine, theirs = self.numbers(), before.numbers()
        grown: dict[str, Any] = {
            name: round(mine[name] - theirs[name], 1) for name in mine if mine[name] > theirs[name]
        }
        grown.pop("pool_idle", None)
        if grown.get("memory_mb", 0) <= MEMORY_MB:
            grown.pop("memory_mb", None)
        if "tasks" in grown:
            grown["tasks"] = dict(self.task_names - before.task_names)
        return grown


async def look(stand: Stand) -> Figures:
    """Measure now, after closing the session's own connections."""
    async with stand.engine_session() as engine:
        async with engine.get("/metrics") as answer:
            lines = (await answer.text()).splitlines()
        async with engine.get(ATTEST_ROUTE) as answer:
            attested = Attestation.read(await answer.read())
    waiting = sum(
        float(line.rpartition(" ")[2])
        for line in lines
        if line.startswith(("vllm:num_requests_running", "vllm:num_requests_waiting{"))
    )
    in_flight = await stand.metric("interpretops_requests_in_flight")
    gateway = stand.gateway
    reported = stand.state()
    names = Counter(reported["tasks"])
    return Figures(
        tasks=names.total(),
        task_names=names,
        fds=gateway.num_fds(),
        sockets=len(gateway.net_connections("all")),
        threads=reported["threads"] - reported["pool_idle"],
        pool_idle=reported["pool_idle"],
        engine_requests=int(waiting),
        revisions=max(len(rank.resident) for core in attested.engines for rank in core.ranks),
        in_flight=int(in_flight),
        memory_mb=round(gateway.memory_info().rss / 2**20, 1),
    )


async def settle(stand: Stand, before: Figures | None) -> Figures:
    """Measure once the figures are back at ``before``, or after a timeout."""
    end = time.monotonic() + _SETTLE_S
    while True:
        # Longer than the gateway keeps idle engine connections.
        await asyncio.sleep(0.5 if before else 4)
        now = await look(stand)
        if before is None or not now.more_than(before) or time.monotonic() > end:
            return now
