"""`mechctl serve` in operation: TLS on both listeners, keys, an audit log, and signals under load."""

import asyncio
import contextlib
import fcntl
import os
import re
import resource
import signal
import ssl
import sys
import termios
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from certificates import write_certificate
from fake_engine import FakeEngine
from running_gateway import PolicyWriter, Until

from interpretops.records.api_keys import make_key, write_keys
from interpretops.records.audit_chain import verify
from proxy.process import open_file_limit as open_files

CONFIG = """
tenants: [{id: acme, limits: {token_budget: 1000}}]
bindings: [{policy: calm, mode: mandatory, match: {tenant: acme}}]
audit: {path: audit.jsonl, fsync: always}
paths: {keys: keys.yaml, state: state, policies: policies, artifacts: .}
gateway:
  port: 0
  admin_port: 0
  tls_cert: cert.pem
  tls_key: key.pem
  admin_tls_cert: cert.pem
  admin_tls_key: key.pem
"""


PROGRAM = "from mechctl.main import app; app()"


@asynccontextmanager
async def serving(
    engine: FakeEngine,
    tmp_path: Path,
    policy_writer: PolicyWriter,
    config: str = CONFIG,
    before: str = "",
    **how: Any,
) -> AsyncIterator[Any]:
    """A gateway in its own process with the fake engine; its URLs, keys and trust.

    before  code that the process runs before `mechctl`
    """
    cert, _ = write_certificate(tmp_path)
    (tmp_path / "policies").mkdir()
    policy_writer(tmp_path / "policies", "calm")
    made = {"tenant": make_key(tenant="acme"), "viewer": make_key(role="viewer")}
    write_keys(tmp_path / "keys.yaml", [kept for _, kept in made.values()])
    (tmp_path / "config.yaml").write_text(config)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", before + PROGRAM, "serve"),
        *("--config", str(tmp_path / "config.yaml"), "--engine-url", engine.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
        **{"preexec_fn": _allow_few_files, **how},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        ready = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        reported = ""
        while "admin and metrics on" not in reported:
            line = (await asyncio.wait_for(process.stderr.readline(), 10)).decode()
            assert line, f"it ended: {reported}"
            reported += line
        admin = re.search(r"admin and metrics on (\S+)", reported)
        assert admin is not None
        headers = {holder: {"Authorization": f"Bearer {key}"} for holder, (key, _) in made.items()}
        trust = ssl.create_default_context(cafile=cert)
        yield process, ready.split()[1].removesuffix("/v1"), admin[1], headers, trust
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


FEW_FILES = 128


def _allow_few_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, hard))


@pytest.fixture
async def served(engine: FakeEngine, tmp_path: Path, policy_writer: PolicyWriter) -> AsyncIterator[Any]:
    """A gateway as configured above."""
    async with serving(engine, tmp_path, policy_writer) as running:
        yield running


async def test_serve_raises_its_limit_of_open_files(served: Any) -> None:
    """With a shell's soft limit, a few hundred requests in progress reset connections."""
    process, *_ = served
    soft, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    assert soft == min(open_files.MAX_OPEN_FILES, hard) > FEW_FILES


async def test_stop_under_load_completes_requests_and_records(
    served: Any, engine: FakeEngine, tmp_path: Path
) -> None:
    """After SIGTERM no new connection is accepted, a running stream completes, and the exit status is 0."""
    process, url, admin, headers, trust = served
    assert url.startswith("https://127.0.0.1:")
    assert admin.startswith("https://127.0.0.1:")
    body = {"model": "tiny-model", "messages": [], "stream": True}
    route = f"{url}/v1/chat/completions"
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session:
        async with session.get(f"{admin}/metrics", headers=headers["tenant"]) as answer:
            assert answer.status == 401
        async with session.get(f"{admin}/metrics", headers=headers["viewer"]) as answer:
            assert "interpretops_ready 1.0" in await answer.text()
        engine.trick = "hold_stream"
        async with session.post(route, json=body, headers=headers["tenant"]) as running:
            first = await running.content.readany()
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while True:
                    try:
                        async with aiohttp.ClientSession() as fresh, fresh.post(route, ssl=trust) as refused:
                            assert refused.status >= 400
                    except aiohttp.ClientConnectorError:
                        break
            engine.go_on.set()
            text = (first + await running.content.read()).decode()
    assert text.count(": steering-receipt {") == 1
    assert text.endswith("\n\ndata: [DONE]\n\n")
    assert await asyncio.wait_for(process.wait(), 30) == 0
    found = verify(tmp_path / "audit.jsonl")
    assert found.intact, found.faults
    events = re.findall(r'"event":"(\w+)"', (tmp_path / "audit.jsonl").read_text())
    assert events[0] == "gateway_started"
    assert events[-1] == "gateway_stopped"
    assert "policy_active" in events
    assert '"acme": ' in (tmp_path / "state" / "usage.json").read_text()


QUIET = CONFIG.replace("  port: 0\n", "  port: 0\n  watch_policies: false\n", 1)


async def test_sighup_reloads_everything_and_interrupts_nothing(
    engine: FakeEngine, tmp_path: Path, policy_writer: PolicyWriter, until: Until
) -> None:
    """SIGHUP reloads like the admin API, policies and audit file included; a stream continues."""
    async with serving(engine, tmp_path, policy_writer, QUIET) as (process, url, admin, headers, trust):
        body = {"model": "tiny-model", "messages": [], "stream": True}
        route, engine.trick = f"{url}/v1/chat/completions", "hold_stream"
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session,
            session.post(route, json=body, headers=headers["tenant"]) as running,
        ):

            async def fresh_policy() -> bool:
                async with session.get(f"{admin}/admin/policies", headers=headers["viewer"]) as answer:
                    return "fresh" in {entry["id"] for entry in (await answer.json())["policies"]}

            first = await running.content.readany()
            policy_writer(tmp_path / "policies", "fresh")
            (tmp_path / "audit.jsonl").rename(tmp_path / "audit.jsonl.1")
            process.send_signal(signal.SIGHUP)
            await until(fresh_policy)
            engine.go_on.set()
            text = (first + await running.content.read()).decode()
        assert text.endswith("\n\ndata: [DONE]\n\n")
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 30) == 0
    events = re.findall(r'"event":"(\w+)"', (tmp_path / "audit.jsonl").read_text())
    assert events[0] == "log_continued"
    assert verify(tmp_path / "audit.jsonl").intact


async def test_renewed_certificate_is_taken_while_running(served: Any, tmp_path: Path, until: Until) -> None:
    """Both listeners use it within seconds, and the metric shows its expiry."""
    _, url, admin, headers, _ = served
    cert, _ = write_certificate(tmp_path, ends=timedelta(days=90))
    trust = ssl.create_default_context(cafile=cert)
    text = ""
    for address in (f"{url}/healthz", f"{admin}/metrics"):

        async def answered(address: str = address) -> bool:
            nonlocal text
            try:
                async with (
                    aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trust)) as session,
                    session.get(address, headers=headers["viewer"]) as answer,
                ):
                    text = await answer.text()
            except aiohttp.ClientConnectorCertificateError:
                return False
            return True

        await until(answered)
    found = re.findall(r'tls_certificate_expiry_timestamp_seconds\{listener="(\w+)"\} (\S+)', text)
    assert [name for name, _ in found] == ["public", "admin"]
    assert all(float(value) == pytest.approx(time.time() + 90 * 86400, abs=60) for _, value in found)


async def test_connections_that_never_start_tls_time_out(
    engine: FakeEngine, tmp_path: Path, policy_writer: PolicyWriter
) -> None:
    """On both listeners, under the production event loop: closed after `gateway.body_timeout_s`."""
    config = CONFIG + "  body_timeout_s: 1\n"
    async with serving(engine, tmp_path, policy_writer, config) as (_, *urls, _, _):
        for url in urls:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rsplit(":", 1)[1]))
            with contextlib.suppress(ConnectionResetError):
                assert await asyncio.wait_for(reader.read(), 10) == b""
            writer.close()


SHORT = CONFIG + "  shutdown_grace_s: 0.5\n"
HANGING = """
import asyncio, os, threading, proxy.gateway, proxy.policies.policy_folders, proxy.process.signals
def hang():
    open("hangs", "w").close()
    os.open("pipe", os.O_RDONLY)
def thread(look=proxy.policies.policy_folders.PolicyFolders.scan):
    def hanging(folders):
        if os.path.exists("now"):
            hang()
        return look(folders)
    proxy.policies.policy_folders.PolicyFolders.scan = hanging
async def until_now():
    while not os.path.exists("now"):
        await asyncio.sleep(0.05)
def pool():
    async def watch(*_arguments):
        await until_now()
        await asyncio.to_thread(hang)
    proxy.services.watch_policies = watch
def loop():
    proxy.process.signals._ENGINE_END_S = 0.5
    async def watch(*_arguments):
        await until_now()
        hang()
    proxy.services.watch_policies = watch
"""


async def test_stop_with_idle_threads_is_quick_and_silent(
    engine: FakeEngine, tmp_path: Path, policy_writer: PolicyWriter
) -> None:
    """Idle pool threads end with the gateway; nothing is reported as hanging."""
    async with serving(engine, tmp_path, policy_writer) as (process, *_):
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        reported = (await process.stderr.read()).decode()
    assert "hang" not in reported


@pytest.mark.parametrize(("where", "status"), [("thread", 0), ("pool", 0), ("loop", 130)])
async def test_stop_is_bounded_whatever_hangs(
    engine: FakeEngine, tmp_path: Path, policy_writer: PolicyWriter, where: str, status: int, until: Until
) -> None:
    """A hanging thread is abandoned; a hanging event loop is killed; both are reported."""
    os.mkfifo(tmp_path / "pipe")
    before = HANGING + f"{where}()\n"
    async with serving(engine, tmp_path, policy_writer, SHORT, before, cwd=tmp_path) as (process, *_):

        async def hangs() -> bool:
            return (tmp_path / "hangs").exists()

        (tmp_path / "now").touch()
        await until(hangs)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == status
        reported = (await process.stderr.read()).decode()
    assert "hang:" in reported
    if where != "loop":
        assert verify(tmp_path / "audit.jsonl").intact
        assert '"event":"gateway_stopped"' in (tmp_path / "audit.jsonl").read_text()


async def test_closing_the_terminal_ends_the_gateway(
    engine: FakeEngine, tmp_path: Path, policy_writer: PolicyWriter
) -> None:
    """A hangup because the terminal closed is not a reload: nobody could stop the gateway otherwise."""
    master, slave = os.openpty()

    def own_terminal() -> None:
        # Ignored in a job that nohup or a shell's background started, and so inherited.
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    how = {"start_new_session": True, "preexec_fn": own_terminal, "pass_fds": [slave]}
    async with serving(engine, tmp_path, policy_writer, **how) as (process, *_):
        os.close(slave)
        process.send_signal(signal.SIGHUP)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.wait(), 1)
        os.close(master)
        assert await asyncio.wait_for(process.wait(), 30) == 0
