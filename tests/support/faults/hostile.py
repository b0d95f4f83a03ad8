"""Malformed requests over raw sockets, and clients that disconnect at four moments."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Coroutine
from email.parser import BytesParser
from typing import Any, Final
from urllib.parse import urlsplit

from faults.answers import Judgement, judge
from faults.raw_requests import malformed
from faults.stand import Stand
from faults.traffic import Traffic, make_body

_AT_ONCE: Final = 24
PHASES: Final = ("before headers", "before first token", "mid-stream", "non-stream")


async def send_malformed(stand: Stand, traffic: Traffic, count: int) -> None:
    """Send each on its own connection. Incomplete requests are answered late, or closed.

    A request whose headers are incomplete gets no answer.
    """

    async def send(data: bytes) -> None:
        reader, writer = await _connect(stand)
        writer.write(data)
        answers: list[Judgement] = []
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, TimeoutError):
            # An answer may be followed by one to bytes hidden in the request.
            answers.append(await _read_answer(reader))
            while True:
                async with asyncio.timeout(0.2):
                    answers.append(await _read_answer(reader))
        writer.transport.abort()
        if not answers:
            traffic.count(
                Judgement("misshapen", "no answer") if is_whole(data) else Judgement("unfinished"),
                f"malformed {data[:200]!r}",
            )
        for judged in answers:
            traffic.count(judged, f"malformed {data[:200]!r}")

    await _in_turn([send(data) for data in malformed(count, stand.model)])


def is_whole(data: bytes) -> bool:
    """Whether the headers are complete under any reading."""
    return b"\r\n\r\n" in data.lstrip(b"\r\n")


async def disconnect(stand: Stand, traffic: Traffic, count: int) -> None:
    """Disconnect before the answer's headers, before its first token, midway, and without a stream."""
    pick = random.Random(1)

    async def leave(phase: str) -> None:
        stream = phase != "non-stream"
        body = json.dumps(make_body("/v1/chat/completions", stand.model, stream=stream, tokens=400)).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        reader, writer = await _connect(stand)
        writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            if phase in ("before headers", "non-stream"):
                await writer.drain()
                await asyncio.sleep(pick.random() * (0.02 if stream else 1))
            else:
                reported = await reader.readuntil(b"\r\n\r\n")
                if not reported.startswith(b"HTTP/1.1 200"):
                    traffic.count(await _read_body(reader, reported), f"one to be left {phase}")
                elif phase == "mid-stream":
                    for _ in range(3):
                        await reader.readuntil(b"\n\n")
        traffic.counts["left"] += 1
        writer.transport.abort()

    await _in_turn([leave(PHASES[index % len(PHASES)]) for index in range(count)])


async def _connect(stand: Stand) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    where = urlsplit(stand.url)
    return await asyncio.open_connection(where.hostname, where.port)


async def _in_turn(work: list[Coroutine[Any, Any, None]]) -> None:
    free = asyncio.Semaphore(_AT_ONCE)

    async def one(part: Coroutine[Any, Any, None]) -> None:
        async with free:
            await part

    async with asyncio.TaskGroup() as group:
        for part in work:
            group.create_task(one(part))


async def _read_answer(reader: asyncio.StreamReader) -> Judgement:
    return await _read_body(reader, await reader.readuntil(b"\r\n\r\n"))


async def _read_body(reader: asyncio.StreamReader, head: bytes) -> Judgement:
    status = re.match(rb"HTTP/1\.[01] (\d{3}) ", head)
    if status is None:
        return Judgement("misshapen", f"no HTTP: {head[:80]!r}")
    headers = BytesParser().parsebytes(head.partition(b"\r\n")[2])
    if status[1] == b"100":
        return await _read_answer(reader)
    body = await reader.readexactly(int(headers["Content-Length"]))
    if status[1] == b"200" and b'"object": "list"' in body[:32]:
        return Judgement("listed")
    return judge(int(status[1]), dict(headers), body.decode())
