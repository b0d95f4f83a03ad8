"""Clients: most send a request and wait; some stall, disconnect, send slowly, pipeline, or arrive in
bursts."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Callable

from simulation.asks import Ask
from simulation.connection import ClientConnection
from simulation.network import Network
from simulation.scenario import POLICIES, ROUTES, Scenario

PUBLIC = "/simulated/gateway.sock"
_PATIENCE_S = 60.0


class Clients:
    """All clients of one run, and all their requests."""

    def __init__(
        self,
        scenario: Scenario,
        network: Network,
        chance: random.Random,
        keys: dict[str, str],
        ended: Callable[[Ask], None],
    ) -> None:
        self._scenario = scenario
        self._network = network
        self._chance = chance
        self._keys = keys
        self._ended = ended
        self._numbers = itertools.count(1)
        self.tenant_of: dict[str, str] = {}
        """Request number to its tenant."""
        self.revoked_at: dict[str, float] = {}
        """Tenant to the time at which its key was revoked."""
        self.asks: list[Ask] = []
        self.connections: list[ClientConnection] = []

    def draw(self, tenant: str | None = None) -> Ask:
        """A random request of a random tenant."""
        chance = self._chance
        tenant = tenant or chance.choice([entry["id"] for entry in self._scenario.tenants])
        ask = self.plain(tenant, chance.choice(ROUTES))
        if self._scenario.aliases and chance.random() < 0.4:
            ask.model = "safe"
        if chance.random() < 0.3:
            ask.choice = chance.choice([*POLICIES, "none", "unknown"])
            ask.by_alias = chance.random() < 0.4
        ask.stream = chance.random() < 0.5
        ask.most = chance.choice((1, 4, 8, 40))
        if ask.route == "/v1/completions" and chance.random() < 0.3:
            ask.prompts = chance.choice((2, 3, 20))
        if ask.route in ROUTES[:2] and chance.random() < 0.2:
            ask.choices = chance.choice((2, 4))
        return ask

    def plain(self, tenant: str, route: str) -> Ask:
        """An ordinary request."""
        ask = Ask(next(self._numbers), tenant, self._keys.get(tenant), route)
        self.asks.append(ask)
        self.tenant_of[str(ask.number)] = tenant
        ask.revoked_since = self.revoked_at.get(tenant)
        return ask

    async def connect(self) -> ClientConnection | None:
        """A connection, or None if the gateway is not listening."""
        try:
            _, protocol = await self._network.connect(PUBLIC, lambda: ClientConnection(self._ended))
        except OSError:
            return None
        assert isinstance(protocol, ClientConnection)
        self.connections.append(protocol)
        return protocol

    async def run(self, until: float) -> None:
        """Run one client until a given time."""
        loop, chance = asyncio.get_running_loop(), self._chance
        connection: ClientConnection | None = None
        while loop.time() < until:
            await asyncio.sleep(chance.choice((0.0, 0.01, 0.3, 1.0, 2.5)))
            if connection is None or not connection.open or chance.random() < 0.2:
                if connection is not None and connection.open:
                    connection.transport.close()
                connection = await self.connect()
                if connection is None:
                    continue
            way = chance.choices(
                (self._wait, self._vanish, self._stall, self._send_slowly, self._pipeline, self._flood),
                (50, 12, 8, 8, 12, 5),
            )[0]
            await way(connection)

    async def ask(self, ask: Ask) -> Ask:
        """One request on its own connection, to its end."""
        connection = await self.connect()
        if connection is None:
            self.asks.remove(ask)
            ask.cut = True
            return ask
        await self._finish(connection, ask)
        connection.transport.close()
        return ask

    async def _finish(self, connection: ClientConnection, *asks: Ask) -> None:
        for ask in asks:
            connection.send(ask)
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await connection.quiet.wait()
        except TimeoutError:
            connection.leave()

    async def _wait(self, connection: ClientConnection) -> None:
        await self._finish(connection, self.draw())

    async def _pipeline(self, connection: ClientConnection) -> None:
        await self._finish(connection, *(self.draw() for _ in range(self._chance.randint(2, 4))))

    async def _flood(self, connection: ClientConnection) -> None:
        tenant = self._chance.choice([entry["id"] for entry in self._scenario.tenants])
        asks = [self.draw(tenant) for _ in range(self._chance.randint(3, 12))]
        await asyncio.gather(*(self.ask(ask) for ask in asks))

    async def _vanish(self, connection: ClientConnection) -> None:
        connection.send(self.draw())
        await asyncio.sleep(self._chance.choice((0.0, 0.001, 0.05, 0.5, 3.0)))
        if connection.open:
            connection.leave()

    async def _stall(self, connection: ClientConnection) -> None:
        connection.send(self.draw())
        connection.transport.pause_reading()
        await asyncio.sleep(self._chance.choice((1.0, 5.0, 15.0)))
        connection.transport.resume_reading()
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await connection.quiet.wait()
        except TimeoutError:
            connection.leave()

    async def _send_slowly(self, connection: ClientConnection) -> None:
        ask = self.draw()
        head, body = ask.bytes()
        connection.expect(ask)
        connection.transport.write(head)
        pieces = self._chance.randint(1, 4)
        size = len(body) // pieces + 1
        for start in range(0, len(body), size):
            await asyncio.sleep(self._chance.choice((0.0, 0.1, 1.0, 3.0)))
            if not connection.open:
                return
            connection.transport.write(body[start : start + size])
        ask.whole_at = asyncio.get_running_loop().time()
        if self._chance.random() < 0.8:
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    await connection.quiet.wait()
            except TimeoutError:
                connection.leave()
        elif connection.open:
            connection.leave()
