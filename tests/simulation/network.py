"""In-memory connections: bounded buffers, delays, back-pressure, orderly closes and resets, like TCP."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from simulation.trace import Trace

_CAPACITY = 64 * 1024
"""Bytes buffered by both kernels for a reader that does not read."""
_HIGH, _LOW = 64 * 1024, 16 * 1024


class Network:
    """Listeners by address, and network delays."""

    def __init__(self, loop: asyncio.AbstractEventLoop, chance: random.Random, trace: Trace) -> None:
        self.loop = loop
        self._chance = chance
        self._trace = trace
        self.listeners: dict[str, Callable[[], asyncio.Protocol]] = {}
        """Address to a protocol factory; it raises `OSError` to refuse a connection."""
        self._count = 0

    async def connect(
        self, address: str, protocol_factory: Callable[[], Any]
    ) -> tuple[Endpoint, asyncio.Protocol]:
        """Open a connection, as `create_connection` does."""
        await asyncio.sleep(self.delay())
        if address not in self.listeners:
            raise ConnectionRefusedError(f"nobody listens at {address}")
        server = self.listeners[address]()
        self._count += 1
        name = f"{address.rpartition('/')[2]}#{self._count}"
        client = protocol_factory()
        near, far = Endpoint(self, client, f"{name}>"), Endpoint(self, server, f"{name}<")
        near.peer, far.peer = far, near
        server.connection_made(far)
        client.connection_made(near)
        return near, client

    def delay(self) -> float:
        """Delay of a piece from one end to the other."""
        return self._chance.choice((0.0001, 0.0005, 0.001, 0.01))

    def cut(self, size: int) -> int:
        """How much of the received data is read at once."""
        return size if self._chance.random() < 0.8 else self._chance.randint(1, size)

    def note(self, name: str, what: str, data: bytes = b"") -> None:
        """Into the trace."""
        self._trace.add(self.loop.time(), f"{name} {what}", data)


class Endpoint(asyncio.Transport):
    """One end of a connection."""

    def __init__(self, network: Network, protocol: asyncio.Protocol, name: str) -> None:
        super().__init__()
        self.name = name
        self.peer: Endpoint
        self.sends: Callable[[bytes], None] = lambda _data: None
        """Called with data that this end sends, before delivery."""
        self._network = network
        self._loop = network.loop
        self._protocol = protocol
        self._unsent = bytearray()
        self._inbox = bytearray()
        """Data sent by the peer and not yet read by the protocol."""
        self._arriving: asyncio.Handle | None = None
        self._peer_ended = self._told_end = False
        self._closing = self._lost = False
        self._reading = True
        self._choked = False
        self._high, self._low = _HIGH, _LOW

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self._protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = protocol  # type: ignore[assignment]

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return self._reading and not self._closing

    @property
    def gone(self) -> bool:
        """Whether this end is closed for sending."""
        return self._lost

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def get_write_buffer_limits(self) -> tuple[int, int]:
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = _HIGH if high is None else high
        self._low = self._high // 4 if low is None else low

    def can_write_eof(self) -> bool:
        return False

    def write(self, data: Any) -> None:
        if self._closing or not data:
            return
        self._network.note(self.name, "write", bytes(data))
        self.sends(bytes(data))
        self._unsent += data
        self._push()

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(bytes(part) for part in list_of_data))

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._expect()

    def close(self) -> None:
        if self._closing:
            return
        self._closing = True
        self._network.note(self.name, "close")
        self._inbox.clear()
        self._push()

    def abort(self) -> None:
        if self._lost:
            return
        self._network.note(self.name, "abort")
        self._closing = True
        self._unsent.clear()
        self._lose(None)
        self._loop.call_later(self._network.delay(), self.peer._reset)

    def _push(self) -> None:
        """Deliver as much as the wire accepts."""
        if self._lost:
            return
        room = _CAPACITY - len(self.peer._inbox)
        if self.peer._closing:
            # A closed end discards what still arrives.
            self._unsent.clear()
        elif self._unsent and room > 0:
            self.peer._inbox += self._unsent[:room]
            del self._unsent[:room]
            self.peer._expect()
        self._regulate()
        if self._closing and not self._unsent:
            self._loop.call_later(self._network.delay(), self.peer._end)
            self._lose(None)

    def _regulate(self) -> None:
        size = len(self._unsent)
        if not self._choked and size > self._high:
            self._choked = True
            self._protocol.pause_writing()
        elif self._choked and size <= self._low:
            self._choked = False
            self._protocol.resume_writing()

    def _expect(self) -> None:
        if self._arriving is None and not self._lost:
            self._arriving = self._loop.call_later(self._network.delay(), self._arrive)

    def _arrive(self) -> None:
        self._arriving = None
        if self._lost or self._closing or not self._reading:
            return
        if self._inbox:
            size = self._network.cut(len(self._inbox))
            data = bytes(self._inbox[:size])
            del self._inbox[:size]
            self._protocol.data_received(data)
            self.peer._push()
        if self._inbox:
            self._expect()
        elif self._peer_ended and not self._told_end and not self._closing and self._reading:
            self._told_end = True
            if not self._protocol.eof_received():
                self.close()

    def _end(self) -> None:
        self._peer_ended = True
        if self._closing:
            # The peer is gone, so nobody reads what this end still has to send.
            self._unsent.clear()
            self._push()
        else:
            self._expect()

    def _reset(self) -> None:
        if self._lost:
            return
        self._network.note(self.name, "reset")
        self._closing = True
        self._unsent.clear()
        self._lose(ConnectionResetError("reset by the other end"))

    def _lose(self, error: Exception | None) -> None:
        self._lost = True
        self._inbox.clear()
        self._loop.call_soon(self._protocol.connection_lost, error)
