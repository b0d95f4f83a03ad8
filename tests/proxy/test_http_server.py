"""Bytes that are no HTTP, or that two parsers would read differently, over raw sockets."""

import asyncio
import json
import logging
import re

import pytest

CANARY = "canary-5f2c9d"
BODY = b'{"model": "tiny-model", "messages": []}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
AMBIGUOUS = {
    "length and chunks": POST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "two lengths": POST + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY,
    "length with a sign": POST + b"Content-Length: +39\r\n\r\n" + BODY,
    "length of letters": POST + b"Content-Length: 0x27\r\n\r\n" + BODY,
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
    "chunked is not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED,
    "space before the colon": POST + b"Transfer-Encoding : chunked\r\n" + LENGTH + b"\r\n" + BODY,
    "folded header": POST + b"X-A: b\r\n c\r\n" + LENGTH + b"\r\n" + BODY,
    "NUL in a header": POST + b"X-A: b\x00c\r\n" + LENGTH + b"\r\n" + BODY,
    "header without a name": POST + b": b\r\n" + LENGTH + b"\r\n" + BODY,
    "bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY,
    "chunk that is too short": POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + BODY + b"\r\n0\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "unknown version": b"GET /v1/models HTTP/9.9\r\nHost: a\r\n\r\n",
    "a key in a broken header": POST + b"Authorization: Bearer " + CANARY.encode() + b"\x01\r\n\r\n",
    "a key in a broken line": b"POST /v1/" + CANARY.encode() + b" \x01 HTTP/1.1\r\n\r\n",
    "300 headers": POST + b"".join(b"X-%d: a\r\n" % n for n in range(300)) + b"\r\n",
    "endless header": POST + b"X-A: " + b"a" * 70_000 + b"\r\n\r\n",
}


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


async def test_connections_that_are_no_http_are_counted(start):
    """Each adds to the refusals by its code."""
    front = await start("calm")
    await _exchange(front, AMBIGUOUS["no HTTP"])
    shown = front.apps.gateway.metrics.render().decode()
    assert 'interpretops_refusals_total{reason="invalid_http"} 1.0' in shown
