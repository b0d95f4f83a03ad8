"""Faults other than clients: engines, policies, keys, disk, clocks, threads, restarts."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from simulation.admin import ADMIN, call
from simulation.engine import ROOM, EngineModel
from simulation.engine_server import WRONGS
from simulation.scenario import POLICIES

if TYPE_CHECKING:
    from simulation.world import World

Action = Callable[[], Awaitable[None]]


class Operator:
    """Performs random actions, one after another."""

    def __init__(self, world: World, chance: random.Random, only: frozenset[str] | None) -> None:
        self._world = world
        self._chance = chance
        self._only = only
        """Names of the faults to use; None: all."""
        self._tasks: list[asyncio.Task[None]] = []
        self.thread_errors = 0
        """How many more thread submissions will fail."""
        self.actions: dict[str, tuple[int, Action]] = {
            "wrong_answers": (10, self._wrong_answers),
            "engine_dies": (5, self._engine_dies),
            "engine_restarts_unseen": (3, self._engine_restarts_unseen),
            "engine_hangs": (3, self._engine_hangs),
            "engine_is_sick": (2, self._engine_is_sick),
            "engine_loses_a_plan": (3, self._engine_loses_a_plan),
            "engine_is_full": (2, self._engine_is_full),
            "engine_damages_plans": (1, self._engine_damages_plans),
            "policy_changes": (10, self._policy_changes),
            "policy_changes_back": (4, self._policy_changes_back),
            "policy_waits": (4, self._policy_waits),
            "policy_breaks": (4, self._policy_breaks),
            "policies_clash": (3, self._policies_clash),
            "policy_is_deleted": (2, self._policy_is_deleted),
            "policy_has_two_files": (1, self._policy_has_two_files),
            "folder_vanishes": (2, self._folder_vanishes),
            "reload": (3, self._reload),
            "promote": (4, self._promote),
            "rollback": (3, self._rollback),
            "keys_change": (3, self._keys_change),
            "audit_log_moves": (2, self._audit_log_moves),
            "audit_log_is_deleted": (1, self._audit_log_is_deleted),
            "disk_fills": (3, self._disk_fills),
            "clock_jumps": (2, self._clock_jumps),
            "machine_sleeps": (1, self._machine_sleeps),
            "threads_fail": (3, self._threads_fail),
            "gateway_restarts": (2, self._gateway_restarts),
        }

    def before_thread(self) -> None:
        """Raise if a thread submission must fail."""
        if self.thread_errors:
            self.thread_errors -= 1
            raise RuntimeError("can't start new thread")

    async def run(self, until: float) -> None:
        """Run until a given time."""
        loop, chance = asyncio.get_running_loop(), self._chance
        names = [name for name in self.actions if self._only is None or name in self._only]
        weights = [self.actions[name][0] for name in names]
        while names and loop.time() < until:
            await asyncio.sleep(chance.choice((0.05, 0.3, 1.0, 3.0)))
            name = chance.choices(names, weights)[0]
            self._world.note(f"operator: {name}")
            await self.actions[name][1]()
            self._world.invariants.step(name)

    async def calm(self) -> None:
        """End all faults."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        world = self._world
        self.thread_errors = 0
        world.disk.full = False
        for engine in world.engines:
            world.wrongs[engine.name].clear()
            engine.listening, engine.steers = True, True
            engine.sick = engine.damaged = False
            engine.room = ROOM
            if engine.hangs:
                self._kill(engine)
        world.files.mend()
        world.files.write_keys()
        world.clients.revoked_at.clear()
        self._tell()

    def _later(self, delay_s: float, undo: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(delay_s)
            undo()

        self._tasks.append(asyncio.create_task(wait()))

    def _some_time(self) -> float:
        return self._chance.choice((0.5, 2.0, 6.0, 15.0))

    def _engine(self) -> EngineModel:
        return self._chance.choice(self._world.engines)

    def _tell(self) -> None:
        """Send a file notification, usually."""
        if self._chance.random() < 0.7:
            self._world.notices.tell()

    def _kill(self, engine: EngineModel) -> None:
        for connection in [c for c in self._world.events.engine_connections if c.engine is engine]:
            connection.cut()
        engine.boot()

    async def _wrong_answers(self) -> None:
        engine, chance = self._engine(), self._chance
        wrongs = self._world.wrongs[engine.name]
        wrongs.clear()
        for name in chance.sample(WRONGS, chance.randint(1, 4)):
            wrongs[name] = chance.choice((0.1, 0.3, 0.8))
        self._later(self._some_time(), wrongs.clear)

    async def _engine_dies(self) -> None:
        engine = self._engine()
        engine.listening = False
        self._kill(engine)

        def back() -> None:
            engine.listening = True

        self._later(self._some_time(), back)

    async def _engine_restarts_unseen(self) -> None:
        self._kill(self._engine())

    async def _engine_hangs(self) -> None:
        engine = self._engine()
        engine.hangs = True
        self._later(self._some_time(), lambda: self._kill(engine) if engine.hangs else None)

    async def _engine_is_sick(self) -> None:
        self._set_for_a_while(self._engine(), "sick", value=True)

    async def _engine_is_full(self) -> None:
        engine = self._engine()
        engine.room = len(engine.plans) + self._chance.randint(0, 4)

        def space() -> None:
            engine.room = ROOM

        self._later(self._some_time(), space)

    async def _engine_damages_plans(self) -> None:
        self._set_for_a_while(self._engine(), "damaged", value=True)

    async def _engine_loses_a_plan(self) -> None:
        self._engine().lose_a_plan()

    def _set_for_a_while(self, engine: EngineModel, name: str, *, value: bool) -> None:
        setattr(engine, name, value)
        self._later(self._some_time(), lambda: setattr(engine, name, not value))

    def _policy(self) -> str:
        return self._chance.choice(list(POLICIES))

    async def _policy_changes(self) -> None:
        self._world.files.write(self._policy())
        self._tell()

    async def _policy_changes_back(self) -> None:
        self._world.files.change_back(self._policy())
        self._tell()

    async def _policy_waits(self) -> None:
        self._world.files.write(self._policy(), criteria=True)
        self._tell()

    async def _policy_breaks(self) -> None:
        self._world.files.spoil(self._policy())
        self._tell()

    async def _policies_clash(self) -> None:
        self._world.files.write("beta", layer=POLICIES["alpha"])
        self._tell()

    async def _policy_is_deleted(self) -> None:
        self._world.files.delete(self._policy())
        self._tell()

    async def _policy_has_two_files(self) -> None:
        self._world.files.write(self._policy(), name="another")
        self._tell()

    async def _folder_vanishes(self) -> None:
        self._world.files.take_away()
        self._later(self._some_time(), self._world.files.bring_back)

    async def _keys_change(self) -> None:
        world, chance = self._world, self._chance
        if not world.scenario.keys:
            return
        tenants = [tenant["id"] for tenant in world.scenario.tenants]
        what = chance.choice(("revoke", "delete", "break"))
        now = world.clock.now
        if what == "revoke":
            gone = chance.choice(tenants)
            world.files.write_keys(without=gone)
            world.clients.revoked_at = {gone: now}
        elif what == "delete":
            world.files.delete_keys()
            world.clients.revoked_at = dict.fromkeys(tenants, now)
        else:
            world.files.spoil_keys()

        def back() -> None:
            world.clients.revoked_at = {}
            world.files.write_keys()

        self._later(chance.choice((2.0, 20.0)), back)

    async def _admin(self, path: str, body: Any = None) -> tuple[int, Any]:
        return await call(
            self._world.network, ADMIN, "POST", path, body, self._world.files.keys.get("operator")
        )

    async def _reload(self) -> None:
        self._in_background(self._admin("/admin/reload"))

    async def _promote(self) -> None:
        self._in_background(self._look_and_promote(self._policy()))

    async def _look_and_promote(self, policy: str) -> None:
        """Review a candidate, wait, and promote the reviewed revision."""
        world, chance = self._world, self._chance
        key = world.files.keys.get("operator")
        _, found = await call(world.network, ADMIN, "GET", "/admin/policies", None, key)
        listed = found.get("policies", ()) if isinstance(found, dict) else ()
        named = next((entry["candidate"] for entry in listed if entry["id"] == policy), None)
        if named is None:
            return
        if chance.random() < 0.5:
            # Someone else edits it meanwhile.
            world.files.write(policy, criteria=True)
            world.notices.tell()
        await asyncio.sleep(chance.choice((0.0, 0.3, 3.0)))
        body: dict[str, Any] = {"revision": named[:12], "override": {"by": "somebody", "why": "a test"}}
        if chance.random() < 0.3:
            body = {"revision": named[:12], "to": "shadow"}
        status, entry = await self._admin(f"/admin/policies/{policy}/promote", body)
        if status == 200 and "override" in body and entry["revision"] != named:
            world.invariants.fail(f"{policy}@{named[:12]} was promoted, and {entry['revision'][:12]} serves")

    async def _rollback(self) -> None:
        self._in_background(self._admin(f"/admin/policies/{self._policy()}/rollback"))

    def _in_background(self, doing: Awaitable[Any]) -> None:
        async def wait() -> None:
            await doing

        self._tasks.append(asyncio.create_task(wait()))

    async def _audit_log_moves(self) -> None:
        self._world.files.move_audit_log()

    async def _audit_log_is_deleted(self) -> None:
        if self._world.files.delete_audit_log():
            self._world.invariants.log_deleted_at = self._world.clock.now

    async def _disk_fills(self) -> None:
        disk = self._world.disk
        disk.full, disk.torn = True, self._chance.random() < 0.5

        def space() -> None:
            disk.full = False

        self._later(self._some_time(), space)

    async def _clock_jumps(self) -> None:
        self._world.invariants.clock_was_set = True
        self._world.clock.set_wall(self._chance.choice((-86400.0, -3600.0, -5.0, 5.0, 3600.0, 90000.0)))

    async def _machine_sleeps(self) -> None:
        self._world.clock.advance(self._chance.choice((3.0, 30.0)))

    async def _threads_fail(self) -> None:
        self.thread_errors = self._chance.choice((1, 1, 3, 10))
        self._world.troubled_until = self._world.clock.now + 30.0

    async def _gateway_restarts(self) -> None:
        # The operator makes sure that it can start.
        self._world.disk.full = False
        self._world.files.write_keys()
        self._world.clients.revoked_at = {}
        await self._world.restart_gateway()
