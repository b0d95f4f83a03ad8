"""Listener certificates: renewal with open connections, broken replacements, and the file watch."""

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import pytest
import structlog
from aiohttp import web
from certificates import write_certificate
from cryptography import x509

from interpretops.errors import ConfigError
from interpretops.settings import load_settings
from proxy.http.certificate import validity
from proxy.http.server import Site
from proxy.http.tls import TlsListeners, make_tls_listeners
from proxy.observe.metrics import Metrics

DAY = timedelta(days=1)
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with `cert.pem` and `key.pem`, valid for ten days."""
    write_certificate(tmp_path, ends=10 * DAY)
    return tmp_path


def doors(folder: Path) -> TlsListeners:
    pair = {"gateway.tls_cert": folder / "cert.pem", "gateway.tls_key": folder / "key.pem"}
    return make_tls_listeners(load_settings(overrides=pair, environ={}).gateway)


@asynccontextmanager
async def listening(made: TlsListeners, timeout_s: float = 5.0) -> AsyncIterator[Any]:
    """A TLS listener: its port, and a connect function whose connections are closed at the end."""
    runner = web.AppRunner(web.Application(), shutdown_timeout=0)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    await Site(runner, sock, made.context("public"), timeout_s).start()
    port, clients = sock.getsockname()[1], []

    async def connect(name: str | None = None) -> Self:
        clients.append(await Client.connect(port, name))
        return clients[-1]

    try:
        yield port, connect
    finally:
        for client in clients:
            client.writer.transport.abort()
        await runner.cleanup()


class Client:
    """A persistent connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int, name: str | None = None) -> Self:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        # Without a name the handshake carries no SNI.
        host = {} if name is None else {"server_hostname": name}
        return cls(*await asyncio.open_connection("127.0.0.1", port, ssl=context, **host))

    @property
    def certificate(self) -> bytes:
        return self.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)

    async def ask(self) -> bytes:
        self.writer.write(REQUEST)
        head = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 5)
        await self.reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r")[0]))
        return head[:12]


def on_disk(folder: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert((folder / "cert.pem").read_text())


def sample(metrics: Metrics, name: str) -> float:
    return metrics.registry.get_sample_value(f"interpretops_tls_certificate_{name}", {"listener": "public"})


@pytest.mark.parametrize("name", [None, "localhost"])
async def test_new_connections_get_the_renewed_certificate_and_open_ones_stay(
    folder: Path, name: str | None
) -> None:
    """New connections use the new certificate without a restart; open ones keep the old one."""
    made, metrics, log = doors(folder), Metrics(), structlog.get_logger()
    made.refresh(metrics, log)
    first = on_disk(folder)
    async with listening(made) as (_, connect):
        old = await connect(name)
        assert (old.certificate, await old.ask()) == (first, b"HTTP/1.1 404")
        write_certificate(folder, ends=20 * DAY)
        assert made.refresh(metrics, log) == {}
        new = await connect(name)
        assert new.certificate == on_disk(folder) != first
        assert await old.ask() == await new.ask() == b"HTTP/1.1 404"
        assert sample(metrics, "expiry_timestamp_seconds") == pytest.approx(time.time() + 20 * 86400, abs=60)


BROKEN = {
    "garbage": lambda folder: (folder / "cert.pem").write_text("garbage"),
    "half of it": lambda folder: os.truncate(folder / "cert.pem", 200),
    "another's key": lambda folder: shutil.copy(write_certificate(folder / "other")[0], folder / "cert.pem"),
    "no certificate": lambda folder: (folder / "cert.pem").unlink(),
    "no key": lambda folder: (folder / "key.pem").unlink(),
    "a folder": lambda folder: ((folder / "key.pem").unlink(), (folder / "key.pem").mkdir()),
    "a pipe": lambda folder: ((folder / "key.pem").unlink(), os.mkfifo(folder / "key.pem")),  # type: ignore[func-returns-value]
    "expired": lambda folder: write_certificate(folder, -2 * DAY, -DAY),
}


@pytest.mark.parametrize("how", BROKEN)
async def test_unusable_pair_leaves_the_old_one(folder: Path, how: str) -> None:
    """Log and metric report it until a valid pair is there; clients notice nothing."""
    made, metrics, capture = doors(folder), Metrics(), structlog.testing.LogCapture()
    log = structlog.wrap_logger(None, processors=[capture])
    made.refresh(metrics, log)
    assert sample(metrics, "broken") == 0
    old = on_disk(folder)
    (folder / "other").mkdir()
    BROKEN[how](folder)
    for _ in range(2):
        (reported,) = made.refresh(metrics, log).values()
        assert reported.startswith(f"gateway.tls_{'cert' if '.tls_cert' in reported else 'key'} = {folder}")
    assert [entry["event"] for entry in capture.entries] == ["certificate_refused"]
    assert sample(metrics, "broken") == 1
    async with listening(made) as (_, connect):
        client = await connect()
        assert (client.certificate, await client.ask()) == (old, b"HTTP/1.1 404")
    key = folder / "key.pem"
    key.rmdir() if key.is_dir() else key.unlink(missing_ok=True)
    write_certificate(folder, ends=30 * DAY)
    assert made.refresh(metrics, log) == {}
    assert sample(metrics, "broken") == 0


async def test_unusable_pair_prevents_start_up(folder: Path) -> None:
    """The error names field and file; a pipe does not block it."""
    (folder / "key.pem").unlink()
    os.mkfifo(folder / "key.pem")
    with pytest.raises(
        ConfigError, match=r"gateway.tls_key = .*key.pem, but it cannot be read .is not a regular file"
    ):
        doors(folder)


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01\x02\x00\x01"])
async def test_connection_that_never_starts_tls_is_closed(folder: Path, first: bytes) -> None:
    """A connection that sends nothing or half a handshake is closed in time; others are served meanwhile."""
    async with listening(doors(folder), timeout_s=0.5) as (port, connect):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(first)
        client = await connect()
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 10) == b""
        assert time.monotonic() - began < 5
        assert await client.ask() == b"HTTP/1.1 404"
        writer.close()


@pytest.mark.parametrize(("begins", "ends"), [(-DAY, DAY), (-3 * DAY, -DAY), (DAY, 20_000 * DAY)])
def test_validity_is_what_the_certificate_says(tmp_path: Path, begins: Any, ends: Any) -> None:
    """A chain is valid while all its certificates are; dates after 2049 use another encoding."""
    pem = write_certificate(tmp_path, begins, ends)[0].read_bytes()
    meant = x509.load_pem_x509_certificate(pem)
    found = validity(pem)
    assert found.start == meant.not_valid_before_utc.timestamp()
    assert found.end == meant.not_valid_after_utc.timestamp()
    longer = write_certificate(tmp_path, begins - DAY, ends + DAY)[0].read_bytes()
    assert validity(longer + pem) == validity(pem + longer) == found


@pytest.mark.parametrize("cut", [20, 60, 100])
def test_truncated_certificate_has_no_validity(tmp_path: Path, cut: int) -> None:
    """Truncated bytes raise the intended error."""
    der = ssl.PEM_cert_to_DER_cert(write_certificate(tmp_path)[0].read_text())
    with pytest.raises(ValueError, match="cannot be read"):
        validity(ssl.DER_cert_to_PEM_cert(der[:cut]).encode())
    with pytest.raises(ValueError, match="holds no certificate"):
        validity(b"-----BEGIN PRIVATE KEY-----")
