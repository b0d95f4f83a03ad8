"""What the gateway and its engine hold: the figures that must be the same after a fault as before it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from faults.stand import Stand
from interpretops.engine_api import ATTEST_ROUTE, Attestation

MEMORY_MB = 24.0
"""How much more the gateway may hold than after its first requests: caches fill, heaps fragment."""
_SETTLE_S = 20.0


@dataclass(frozen=True)
class Figures:
    """One look."""

    tasks: int
    fds: int
    sockets: int
    threads: int
    """All but those of the pool that wait for work: it fills up to its size, and then grows no more. One that
    does not come back from its work counts, and so does every thread beside the pool."""
    pool_idle: int
    """Threads of the pool that wait for work, up to the pool's size."""
    engine_requests: int
    """Running and waiting in the engine."""
    revisions: int
    """Plans that hold rows of the engine's tables."""
    in_flight: int
    """Requests that the gateway counts."""
    memory_mb: float
    task_names: Counter[str] = field(compare=False, repr=False)

    def numbers(self) -> dict[str, float]:
        """All but the names."""
        return {name: value for name, value in asdict(self).items() if name != "task_names"}

    def more_than(self, before: Figures) -> dict[str, Any]:
        """What has grown beyond its tolerance."""
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
    """The figures now. With no requests of its own in them: the session's connections are closed before."""
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
    told = stand.state()
    names = Counter(told["tasks"])
    return Figures(
        tasks=names.total(),
        task_names=names,
        fds=gateway.num_fds(),
        sockets=len(gateway.net_connections("all")),
        threads=told["threads"] - told["pool_idle"],
        pool_idle=told["pool_idle"],
        engine_requests=int(waiting),
        revisions=max(len(rank.resident) for core in attested.engines for rank in core.ranks),
        in_flight=int(in_flight),
        memory_mb=round(gateway.memory_info().rss / 2**20, 1),
    )


async def settle(stand: Stand, before: Figures | None) -> Figures:
    """The figures once they are back at ``before``, or as they still are after a while."""
    end = time.monotonic() + _SETTLE_S
    while True:
        # Longer than the gateway keeps idle connections to its engine.
        await asyncio.sleep(0.5 if before else 4)
        now = await look(stand)
        if before is None or not now.more_than(before) or time.monotonic() > end:
            return now
