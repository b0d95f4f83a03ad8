"""The engine model reports requests to the invariants correctly."""

import asyncio
import random
from functools import partial
from typing import Any

import pytest


class Sender(asyncio.Protocol):
    """A sender that notices when the connection is closed."""

    def __init__(self) -> None:
        self.answered, self.gone = asyncio.Event(), asyncio.Event()

    def data_received(self, data: bytes) -> None:
        self.answered.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone.set()


@pytest.mark.usefixtures("simulation")
def test_request_lost_after_a_refusal_is_not_that_refusal() -> None:
    """A refusal by one engine no longer counts once the request was sent to another, even to one that dies
    before reading it."""
    from simulation.clock import Clock
    from simulation.engine import EngineModel
    from simulation.engine_server import EngineServer
    from simulation.events import Events
    from simulation.loop import SimulatedLoop
    from simulation.network import Network
    from simulation.trace import Trace

    clock, refused = Clock(), dict[str, Any]()
    loop = SimulatedLoop(clock, random.Random(1))
    network = loop.network = Network(loop, random.Random(1), Trace())
    events = Events(
        lambda _what: None, lambda _generation: None, refused.__setitem__, lambda ask: refused.pop(ask, None)
    )
    engines = [EngineModel(name, clock, random.Random(1), [0]) for name in ("e0", "e1")]
    for engine in engines:
        network.listeners[engine.name] = partial(EngineServer, engine, events, {})
    body = b'{"prompt": "ask7. hello", "vllm_xargs": {"interpretops_revision": "%b"}}' % (b"a" * 64)
    request = b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

    async def refused_then_lost() -> None:
        first, lacks = await network.connect("e0", Sender)
        first.write(request)
        assert isinstance(lacks, Sender)
        await lacks.answered.wait()
        assert refused.keys() == {"7"}
        second, dies = await network.connect("e1", Sender)
        second.write(request)
        assert isinstance(dies, Sender)
        events.engine_connections[-1].cut()
        await dies.gone.wait()

    loop.run_until_complete(refused_then_lost())
    assert not refused
    loop.close()
