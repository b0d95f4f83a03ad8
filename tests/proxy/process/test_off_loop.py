"""A gateway that cannot start threads still syncs its records and exits."""

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import structlog

from interpretops.records.audit_chain import read_head
from interpretops.settings import AuditSettings
from interpretops.settings.gateway import TracingSettings
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics
from proxy.observe.tracing import Tracing
from proxy.process.off_loop import off_loop


class NoThreads(ThreadPoolExecutor):
    """A thread pool on a machine that cannot start more threads."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        raise RuntimeError("can't start new thread")


@pytest.fixture
async def no_threads() -> None:
    """The test's event loop cannot start threads."""
    asyncio.get_running_loop().set_default_executor(NoThreads())


async def test_work_is_done_in_a_thread() -> None:
    """Normally the event loop keeps running during the work."""
    assert await off_loop(threading.get_ident) != threading.get_ident()


@pytest.mark.usefixtures("no_threads")
async def test_work_is_done_without_a_thread() -> None:
    """Without threads the work is done on the event loop."""
    assert await off_loop(threading.get_ident) == threading.get_ident()


async def test_work_that_fails_is_not_done_twice() -> None:
    """An error of the work itself, of any type, is raised and not mistaken for a missing thread."""
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("the work's own")

    with pytest.raises(RuntimeError, match="the work's own"):
        await off_loop(fail)
    assert calls == [1]


@pytest.mark.usefixtures("no_threads")
async def test_audit_log_is_synced_and_closed_without_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last records and the head are on disk before the gateway exits."""
    forced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: forced.append(os.fstat(descriptor).st_ino))
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path, AuditSettings(path=path), Metrics(), structlog.wrap_logger(None))
    log.append("gateway_stopped")
    await log.close()
    assert path.stat().st_ino in forced
    head = read_head(path)
    assert head is not None
    assert head.seq == 1


@pytest.mark.usefixtures("no_threads")
async def test_last_spans_are_sent_without_a_thread() -> None:
    """Remaining spans are exported when the gateway exits."""

    class Provider:
        shut_down = False

        def shutdown(self) -> None:
            self.shut_down = True

    tracing, provider = Tracing(TracingSettings(), "0"), Provider()
    tracing._provider = provider
    await tracing.close()
    assert provider.shut_down
