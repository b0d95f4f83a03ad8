"""`mechctl serve` as an operator runs it: TLS on both listeners, keys, an audit log, a stop under load."""

import asyncio
import os
import re
import signal
import ssl
import sys

import aiohttp
import pytest
from certificates import write_certificate

from interpretops.api_keys import make_key, write_keys
from interpretops.audit_chain import verify

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


@pytest.fixture
async def served(engine, tmp_path, policy_writer):
    """A gateway in a process of its own before the fake engine; its URLs, keys and trust."""
    cert, _ = write_certificate(tmp_path)
    (tmp_path / "policies").mkdir()
    policy_writer(tmp_path / "policies", "calm")
    made = {"tenant": make_key(tenant="acme"), "viewer": make_key(role="viewer")}
    write_keys(tmp_path / "keys.yaml", [kept for _, kept in made.values()])
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "interpretops.cli", "serve"),
        *("--config", str(config), "--engine-url", engine.url),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        ready = (await asyncio.wait_for(process.stdout.readline(), 60)).decode()
        told = ""
        while "admin and metrics on" not in told:
            told += (await asyncio.wait_for(process.stderr.readline(), 10)).decode()
        admin = re.search(r"admin and metrics on (\S+)", told)
        assert admin is not None
        headers = {holder: {"Authorization": f"Bearer {key}"} for holder, (key, _) in made.items()}
        trust = ssl.create_default_context(cafile=cert)
        yield process, ready.split()[1].removesuffix("/v1"), admin[1], headers, trust
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_stop_under_load_finishes_what_runs_and_leaves_whole_records(served, engine, tmp_path):
    """After SIGTERM no new connection is taken, a running stream ends whole, and the process ends with 0."""
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
