"""Bytes that are no HTTP, or that two parsers would read differently, over raw sockets."""

import asyncio
import json
import logging
import re

import pytest
from faults.raw_requests import AMBIGUOUS, BODY, CANARY, LENGTH, POST


async def _exchange(front, data: bytes) -> bytes:
    url = front.public._base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(data)
    await writer.drain()
    try:
        async with asyncio.timeout(5):
            return await reader.read()
    except (TimeoutError, ConnectionResetError):
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("name", AMBIGUOUS)
async def test_bytes_that_could_smuggle_reach_no_engine(start, engine, caplog, capfd, name):
    """One refusal of OpenAI's shape, then the connection ends; nothing of it reaches the engine or a log."""
    front = await start("calm")
    caplog.set_level(logging.DEBUG)
    # What follows would be a request of its own, were the first one read in another way.
    answer = await _exchange(front, AMBIGUOUS[name] + POST + LENGTH + b"\r\n" + BODY)
    assert len(re.findall(rb"HTTP/1\.[01] [1-5]\d\d ", answer)) == 1, answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1][:1] == b"4", head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert b"x-request-id" in head.lower()
    assert not engine.seen
    shown = answer.decode() + caplog.text + str(front.log) + "".join(capfd.readouterr())
    assert CANARY not in shown


async def test_line_without_a_version_is_refused_in_our_own(start, engine):
    """Others would take it for HTTP/0.9, which has no headers; it is refused alone on its connection too."""
    front = await start("calm")
    answer = await _exchange(front, AMBIGUOUS["no version"])
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert not engine.seen


async def test_connections_that_are_no_http_are_counted(start):
    """Each adds to the refusals by its code."""
    front = await start("calm")
    await _exchange(front, AMBIGUOUS["no HTTP"])
    shown = front.apps.gateway.metrics.render().decode()
    assert 'interpretops_refusals_total{reason="invalid_http"} 1.0' in shown
