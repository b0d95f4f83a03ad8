"""Malformed HTTP, and requests that two parsers would read differently, over raw sockets."""

import asyncio
import json
import logging
import re
from typing import Any

import pytest
from fake_engine import FakeEngine
from faults.raw_requests import AMBIGUOUS, BODY, CANARY, LENGTH, POST
from running_gateway import Front, Start

CHAT = b'{"model": "%s", "messages": [{"role": "user", "content": "hi"}], "stream": %s}'


async def _exchange(front: Front, data: bytes, listener: str = "public") -> bytes:
    url = getattr(front, listener)._base_url
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
async def test_bytes_that_could_smuggle_reach_no_engine(
    start: Start,
    engine: FakeEngine,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    name: str,
) -> None:
    """One error in OpenAI's format, then the connection closes; nothing reaches the engine or a log."""
    front = await start("calm")
    caplog.set_level(logging.DEBUG)
    # If the first request were read differently, the rest would be a request of its own.
    answer = await _exchange(front, AMBIGUOUS[name] + POST + LENGTH + b"\r\n" + BODY)
    assert len(re.findall(rb"HTTP/1\.[01] [1-5]\d\d ", answer)) == 1, answer
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split(b" ")[1][:1] == b"4", head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert b"x-request-id" in head.lower()
    assert not engine.seen
    shown = answer.decode() + caplog.text + str(front.log) + "".join(capfd.readouterr())
    assert CANARY not in shown


async def test_request_line_without_a_version_gets_an_http_1_1_error(
    start: Start, engine: FakeEngine
) -> None:
    """aiohttp would treat it as HTTP/0.9. It is refused, also as the only request on its connection."""
    front = await start("calm")
    answer = await _exchange(front, AMBIGUOUS["no version"])
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    assert not engine.seen


async def test_connections_without_valid_http_are_counted(start: Start) -> None:
    """Each is counted as a refusal by its code."""
    front = await start("calm")
    await _exchange(front, AMBIGUOUS["no HTTP"])
    shown = front.apps.gateway.metrics.render().decode()
    assert 'interpretops_refusals_total{reason="invalid_http"} 1.0' in shown


def _head(line: bytes, body: bytes = b"", more: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return line + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n" + length + more + b"\r\n" + body


def _chat(*, model: bytes = b"tiny-model+calm", stream: bytes = b"false") -> bytes:
    body = CHAT % (model, stream)
    return _head(b"POST /v1/chat/completions", body, b"Content-Type: application/json\r\n")


@pytest.mark.parametrize(
    ("listeners", "status", "data"),
    [
        ("public admin", b"200", _head(b"GET /healthz")),
        ("public admin", b"404", _head(b"GET /nowhere")),
        ("public admin", b"405", _head(b"PATCH /healthz")),
        ("public admin", b"417", _head(b"GET /healthz", more=b"Expect: x\r\n")),
        ("public admin", b"400", AMBIGUOUS["no HTTP"]),
        ("public admin", b"400", AMBIGUOUS["no version"]),
        ("public admin", b"400", AMBIGUOUS["two lengths"]),
        ("public admin", b"400", AMBIGUOUS["endless header"]),
        ("admin", b"200", _head(b"GET /metrics")),
        ("admin", b"200", _head(b"GET /admin/policies")),
        ("admin", b"400", _head(b"GET /admin/policies", more=b"Origin: http://b\r\n")),
        ("public", b"200", _chat()),
        ("public", b"200", _chat(stream=b"true")),
        ("public", b"404", _chat(model=b"none")),
        ("public", b"200", _head(b"GET /openapi.json")),
    ],
    ids=lambda value: value[:40] if isinstance(value, bytes) else value,
)
async def test_server_header_names_no_version(
    start: Start, listeners: str, status: bytes, data: bytes
) -> None:
    """Answers, streams, refusals and low-level errors: `Server` names the product but no version."""
    front = await start("calm")
    for listener in listeners.split():
        answer = await _exchange(front, data, listener)
        head = answer.partition(b"\r\n\r\n")[0]
        assert head.split(b" ")[1] == status, answer
        assert re.findall(rb"(?im)^server: *([^\r\n]*)", head) == [b"interpretops"]
        assert not re.search(rb"(?i)aiohttp|python", head)


async def test_unforeseen_error_names_no_version(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unexpected error, in a route or outside all routes, names no version either."""
    front = await start("calm")

    def fail(*_told: Any, **_named: Any) -> None:
        raise RuntimeError("of nobody's making")

    monkeypatch.setattr(type(front.apps.gateway.readiness), "reasons", fail)
    in_route = await _exchange(front, _head(b"GET /readyz"))
    monkeypatch.setattr(type(front.apps.gateway.tracing), "begin", fail)
    above = await _exchange(front, _head(b"GET /readyz"))
    for answer in (in_route, above):
        assert answer.startswith(b"HTTP/1.1 500 ")
        assert b"\r\nServer: interpretops\r\n" in answer
        assert b"aiohttp" not in answer
