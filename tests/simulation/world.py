"""One run: assembles the parts, injects faults for a while, then ends them and checks."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from interpretops.errors import InterpretOpsError
from simulation.aftermath import Aftermath
from simulation.asks import Ask
from simulation.clients import Clients
from simulation.clock import Clock
from simulation.engine import EngineModel
from simulation.engine_server import EngineServer
from simulation.events import Events
from simulation.files import Files
from simulation.gateway import GatewayProcess
from simulation.invariants import Invariants
from simulation.loop import SimulatedLoop
from simulation.network import Network
from simulation.operator import Operator
from simulation.patches import Disk, Notices
from simulation.scenario import Scenario, engine_address
from simulation.trace import Trace

_REVOKED_S = 8.0
"""Deadline for a removed key, or one whose file was deleted, to stop working."""


class World:
    """Everything in one seed's run."""

    def __init__(
        self,
        seed: int,
        folder: Path,
        clock: Clock,
        disk: Disk,
        notices: Notices,
        loop: SimulatedLoop,
        trace: Trace,
        only: frozenset[str] | None,
    ) -> None:
        def chance(purpose: str) -> random.Random:
            # One random source per part, so that a change in one does not affect all.
            return random.Random(f"{seed}/{purpose}")

        self.clock, self.disk, self.notices, self.trace = clock, disk, notices, trace
        self.scenario = Scenario.draw(chance("scenario"))
        self.invariants = Invariants(self.scenario, clock)
        self.network = Network(loop, chance("network"), trace)
        loop.network = self.network
        found = self.invariants
        refused = found.refused_residency
        self.events = Events(found.step, found.began, refused.__setitem__, lambda ask: refused.pop(ask, None))
        count = [0]
        self.engines = [
            EngineModel(f"e{index}", clock, chance(f"engine {index}"), count)
            for index in range(self.scenario.engines)
        ]
        self.wrongs: dict[str, dict[str, float]] = {engine.name: {} for engine in self.engines}
        for index, engine in enumerate(self.engines):
            self.network.listeners[engine_address(index)] = self._door(engine)
        self.files = Files(folder, self.scenario, chance("files"), disk)
        self.clients = Clients(
            self.scenario, self.network, chance("clients"), self.files.keys, self._answered
        )
        self.invariants.tenant_of = self.clients.tenant_of
        self.operator = Operator(self, chance("operator"), only)
        loop.before_thread = self.operator.before_thread
        loop.set_exception_handler(self._unhandled)
        self._restarting = asyncio.Lock()
        self.gateway: GatewayProcess
        self.troubled_until = 0.0
        """Until when things may be slow."""

    async def run(self) -> None:
        """Run it."""
        loop = asyncio.get_running_loop()
        await self._start_gateway()
        end = loop.time() + self.scenario.active_s
        parts = [asyncio.create_task(self.clients.run(end)) for _ in range(self.scenario.clients)]
        parts += [asyncio.create_task(self.operator.run(end)), asyncio.create_task(self._orchestrate(end))]
        await asyncio.gather(*parts)
        await self.operator.calm()
        self.note("calm")
        await Aftermath(self).check()

    def note(self, what: str) -> None:
        """Write to the trace."""
        self.trace.add(self.clock.now, what)

    async def wait_until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Whether a condition becomes true in time."""
        end = self.clock.now + limit_s
        while not condition():
            if self.clock.now > end:
                return False
            await asyncio.sleep(0.25)
            await self.revive_gateway()
        return True

    async def restart_gateway(self) -> None:
        """Stop and restart the gateway."""
        async with self._restarting:
            self.invariants.gateway = None
            await self.gateway.stop()
            await self._start_gateway()

    async def _orchestrate(self, until: float) -> None:
        while self.clock.now < until:
            await asyncio.sleep(0.5)
            if not self._restarting.locked():
                await self.revive_gateway()

    async def revive_gateway(self) -> None:
        """Restart it if it exited by itself, as an orchestrator does."""
        task = self.gateway.apps.engine_loop.task
        if task is not None and task.done():
            self.note(f"the gateway ended by itself: {task.exception()!r}")
            # The operator makes sure that it can start.
            self.disk.full = False
            self.files.write_keys()
            self.clients.revoked_at = {}
            await self.restart_gateway()

    async def _start_gateway(self) -> None:
        self.gateway = GatewayProcess(self.scenario.settings(self.files.folder), self.network, self._logged)
        try:
            await self.gateway.start()
        except InterpretOpsError as error:
            self.invariants.fail(f"the gateway does not start: {error}")
            raise
        self.invariants.watch(self.gateway.apps.gateway)

    def ready(self) -> bool:
        """Whether the gateway reports ready."""
        return not self.gateway.apps.gateway.readiness.reasons()

    def _door(self, engine: EngineModel) -> Callable[[], EngineServer]:
        return lambda: EngineServer(engine, self.events, self.wrongs[engine.name])

    def _answered(self, ask: Ask) -> None:
        self.invariants.answered(ask)
        since = ask.revoked_since
        if ask.status != 200 or since is None or self.clients.revoked_at.get(ask.tenant) != since:
            return
        if ask.sent_at > max(since + _REVOKED_S, self.troubled_until):
            self.invariants.fail(
                f"{ask.request_id}: answered to a key that was revoked {ask.sent_at - since:.1f} s before"
            )

    def _logged(self, entry: dict[str, Any]) -> None:
        self.trace.add(self.clock.now, "log " + " ".join(f"{k}={v}" for k, v in sorted(entry.items())))
        self.invariants.logged(entry)

    def _unhandled(self, _loop: Any, context: dict[str, Any]) -> None:
        self.invariants.fail(f"nobody handles: {context.get('message')} {context.get('exception')!r}")
