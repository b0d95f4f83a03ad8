"""A gateway connected to the fake engine, and what its tests share."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp import ClientSession, web
from fake_engine import FakeEngine
from running_gateway import Front, PolicyWriter, Start, Until, write_policy

from interpretops.settings import load_settings
from proxy.engines.loop import RemoteEngine
from proxy.gateway import make_app
from proxy.http.server import Runner


@pytest.fixture
def policy_writer() -> PolicyWriter:
    return write_policy


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[FakeEngine]:
    async with FakeEngine(tmp_path / "e.sock").running() as running:
        yield running


@pytest.fixture
def until() -> Until:
    """Wait until an async condition holds, for states that no event announces, such as another process's."""

    async def wait(condition: Callable[[], Awaitable[object]], timeout_s: float = 10) -> None:
        async with asyncio.timeout(timeout_s):
            while not await condition():  # noqa: ASYNC110
                await asyncio.sleep(0.02)

    return wait


@pytest.fixture
async def start(tmp_path: Path, engine: FakeEngine) -> AsyncIterator[Start]:
    """Start a gateway connected to the fake engine; ``bindings`` and ``gateway`` are settings sections."""
    stack: list[Any] = []

    async def run(*policies: str, wait: bool = True, **sections: Any) -> Front:
        folder = tmp_path / "policies"
        folder.mkdir(exist_ok=True)
        for name in policies:
            write_policy(folder, name)
        overrides = {"paths.policies": folder, "paths.artifacts": tmp_path, "engine.url": engine.url}
        settings = load_settings(overrides={**overrides, **sections}, environ={})
        log: list[Any] = []
        capture = structlog.testing.LogCapture()
        capture.entries = log
        logger = structlog.wrap_logger(None, processors=[capture])
        apps = make_app(settings, lambda url: RemoteEngine(url or ""), logger)
        runners = [
            Runner(
                app,
                apps.gateway.metrics,
                logger,
                handler_cancellation=True,
                shutdown_timeout=1,
                access_log=None,
            )
            for app in (apps.public, apps.admin)
        ]
        sessions = []
        for runner in runners:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            sessions.append(ClientSession(f"http://{host}:{port}/"))
        stack.extend((*(session.close for session in sessions), *(runner.cleanup for runner in runners)))
        if wait:
            await asyncio.wait_for(apps.engine_loop.first_ready.wait(), 10)
        return Front(sessions[0], sessions[1], apps, folder, log, runners)

    yield run
    for close in stack:
        await close()
