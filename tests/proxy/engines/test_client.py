"""Calls to an engine end when its client is closed."""

import asyncio
from pathlib import Path

import pytest

from interpretops.errors import EngineError
from proxy.engines.client import EngineClient

HEADERS = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.parametrize("came", [b"", HEADERS, HEADERS + b'{"a":'], ids=["nothing", "headers", "half"])
async def test_call_in_progress_fails_when_the_client_is_closed(tmp_path: Path, came: bytes) -> None:
    """However much of the answer has arrived, the caller learns at once that no more will come."""
    sent = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(came)
        await writer.drain()
        sent.set()
        await reader.read()
        writer.close()

    server = await asyncio.start_unix_server(answer, tmp_path / "engine.sock")
    client = EngineClient(f"unix://{tmp_path / 'engine.sock'}", connect_timeout_s=5.0)
    call = asyncio.create_task(client.attest())
    await sent.wait()
    # The client has read what has arrived after one event-loop turn per read step.
    for _ in range(20):
        await asyncio.sleep(0)
    await client.close()
    async with asyncio.timeout(10):
        with pytest.raises(EngineError, match="given up"):
            await call
    server.close()
    await server.wait_closed()
