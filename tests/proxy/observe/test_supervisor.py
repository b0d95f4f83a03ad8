"""No gateway task fails silently: failures are logged, counted, restarted and reported."""

import ast
import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import structlog
import watchfiles
from running_gateway import Start, Until

import proxy
from interpretops.errors import EngineError
from interpretops.records.api_keys import make_key, write_keys
from proxy.admin import reload, watch
from proxy.engines.client import EngineClient
from proxy.engines.fleet_loop import FleetLoop
from proxy.http.stall_guard import StallGuard
from proxy.http.tls import TlsListeners
from proxy.observe import audit_log as audit
from proxy.observe import supervisor, transcripts
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Readiness
from proxy.observe.supervisor import BRIEF, KEPT, Supervisor, end, first_of
from proxy.observe.transcripts import Transcripts
from proxy.policies.intake import Intake
from proxy.tenants import budget
from proxy.tenants.access import Access
from proxy.tenants.budget import Budgets
from proxy.tenants.shared_limits import SharedCounts
from proxy.verification.canary import Canary

SECRET = "a-prompt-7c1d"
PLACES = {
    "readiness": (Readiness, "log_changes"),
    "policies": (Intake, "reload"),
    "policy notifications": (watchfiles, "awatch"),
    "keys": (Access, "refresh"),
    "certificates": (TlsListeners, "refresh"),
    "reloads": (reload, "reload_everything"),
    "audit": (AuditLog, "sync"),
    "budgets": (Budgets, "save"),
    "shared limits": (SharedCounts, "_flush"),
    "stalls": (StallGuard, "check"),
    "engines": (FleetLoop, "_configured"),
    "engine": (EngineClient, "healthy"),
    "canary": (Canary, "step"),
    "transcripts": (Transcripts, "_store_next"),
    "retention": (transcripts, "delete_old"),
}
"""The function that each permanent task calls in every iteration."""


class Gone:
    """A closed connection."""

    transport = None


def calls_in_the_gateway(*names: str) -> Iterator[Any]:
    """(file, call) of every call of a function or method of these names."""
    for path in sorted(Path(proxy.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", None))
                if name in names:
                    yield path.name, node


def test_every_task_is_started_by_the_supervisor() -> None:
    """Nothing else in the gateway starts tasks, so none can fail unnoticed."""
    starters = ("create_task", "ensure_future", "TaskGroup", "run_coroutine_threadsafe", "Task")
    assert {file for file, _ in calls_in_the_gateway(*starters)} == {"supervisor.py"}


def test_every_declared_task_is_started_and_tested() -> None:
    """The declared task names match the tasks that exist."""
    started = {
        node.args[0].value
        for _, node in calls_in_the_gateway("keep", "spawn")
        if node.args and isinstance(node.args[0], ast.Constant)
    }
    assert started == {*KEPT, *BRIEF}
    assert PLACES.keys() == KEPT.keys()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten pauses that are not under test."""
    for module, name in ((watch, "_POLL_S"), (budget, "_SAVE_EVERY_S"), (audit, "_SYNC_EVERY_S")):
        monkeypatch.setattr(module, name, 0.02)
    monkeypatch.setattr(supervisor, "_DELAYS_S", (0.02,))
    monkeypatch.setattr(transcripts, "_SWEEP_EVERY_S", 0.02)
    monkeypatch.setattr("proxy.http.stall_guard._EVERY_S", 0.02)
    monkeypatch.setattr("proxy.observe.readiness._CHECK_EVERY_S", 0.02)
    monkeypatch.setattr("proxy.engines.loop._WATCH_EVERY_S", 0.02)
    monkeypatch.setattr("proxy.engines.fleet_loop._RESOLVE_EVERY_S", 0.02)


def break_on_demand(monkeypatch: pytest.MonkeyPatch, owner: ModuleType | type, name: str) -> dict[str, int]:
    """Make a function raise while ``broken`` is set; counts its successful calls."""
    original, state = getattr(owner, name), {"broken": False, "well": 0}

    def replaced(*args: Any, **kwargs: int) -> Any:
        if state["broken"]:
            raise RuntimeError(SECRET)
        state["well"] += 1
        if owner is Transcripts:
            args[0]._waiting.clear()
            return asyncio.sleep(0)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, replaced)
    return state


@pytest.mark.usefixtures("quick", "engine")
@pytest.mark.parametrize("task", KEPT)
async def test_failed_task_is_logged_counted_and_restarted(
    start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, until: Until, task: str
) -> None:
    """Whatever a task raises: the log names task, type and place, never the text; a metric counts it; the
    task resumes when it can; and while an enforcing task keeps failing, the gateway is not ready."""
    write_keys(tmp_path / "keys.yaml", [make_key(role="viewer")[1]])
    # As with a DNS name: the list of engines is checked again and again.
    monkeypatch.setattr(FleetLoop, "_grows", True)
    state = break_on_demand(monkeypatch, *PLACES[task])
    # One call waits until something changes.
    state["broken"] = task == "policy notifications"
    front = await start(
        "calm",
        **{
            "paths.keys": tmp_path / "keys.yaml",
            "paths.state": tmp_path / "state",
            "paths.transcripts": tmp_path / "kept",
            "audit.path": tmp_path / "audit.jsonl",
            "canary.interval_s": 0.02,
            "limits.redis_url": "redis://127.0.0.1:1/0" if task == "shared limits" else None,
        },
    )
    gateway = front.apps.gateway
    stalls = gateway.supervisor.keep("stalls", lambda alive: gateway.stall_guard.run(lambda: [Gone()], alive))
    signal = asyncio.Event()
    reloads = gateway.supervisor.keep(
        "reloads", lambda alive: reload.reload_on_signal(signal, gateway, alive)
    )

    def shown(metric: str) -> float:
        (value,) = (
            float(line.rsplit(" ", 1)[1])
            for line in gateway.metrics.render().decode().splitlines()
            if line.startswith(f'{metric}{{task="{task}"}}')
        )
        return value

    def nudge() -> None:
        signal.set()
        if task == "shared limits":
            gateway.limiter._shared._has_pending.set()
        if task == "transcripts":
            gateway.transcripts._waiting.append(None)
            gateway.transcripts._more.set()
        if task == "policy notifications":
            (front.policies / "calm.yaml").touch()

    async def failed() -> bool:
        nudge()
        return shown("interpretops_task_failures_total") >= 3

    async def ready() -> bool:
        nudge()
        return await front.engine_ready() and not shown("interpretops_task_down")

    assert state["broken"] or shown("interpretops_task_failures_total") == 0
    state["broken"] = True
    await until(failed)
    if KEPT[task]:
        assert not await front.engine_ready()
        assert [reason.code for reason in gateway.readiness.reasons()] == ["task_down"]
    assert gateway.supervisor.down == [task] * KEPT[task]
    assert shown("interpretops_task_down") == 1
    state.update(broken=False, well=0)
    await until(ready)
    assert state["well"]
    line = next(line for line in front.log if line["event"] == "task_failed" and line["task"] == task)
    assert (line["kind"], line["log_level"]) == ("RuntimeError", "error")
    assert "replaced:" in line["place"]
    assert SECRET not in str(front.log)
    await end(stalls, reloads)


@pytest.fixture
def watched() -> tuple[Supervisor, list[Any], list[Any]]:
    """A supervisor with no pauses, its metrics and its log."""
    log = structlog.testing.LogCapture()
    metrics = Metrics()
    pauses = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0)

    return Supervisor(metrics, structlog.wrap_logger(None, processors=[log]), pause), log.entries, pauses


@pytest.mark.parametrize("ending", ["raises", "returns", "group", "cancelled inside"])
async def test_task_is_restarted_however_it_ends(
    watched: tuple[Supervisor, list[Any], list[Any]], ending: str
) -> None:
    """An exception, an exception group, a return, and a cancellation of what it awaits all count as
    failures."""
    tasks, log, pauses = watched
    turns, over = [], asyncio.Event()

    async def run(alive: Callable[..., Any]) -> None:
        turns.append(ending)
        if len(turns) > 9:
            alive()
            over.set()
            await asyncio.Event().wait()
        if ending == "raises":
            raise KeyError(SECRET)
        if ending == "group":
            raise ExceptionGroup(SECRET, [KeyError(SECRET)])
        if ending == "cancelled inside":
            raise asyncio.CancelledError(SECRET)

    task = tasks.keep("keys", run)
    await asyncio.wait_for(over.wait(), 5)
    kinds = {"returns": "returned", "cancelled inside": "CancelledError"}
    assert {line["kind"] for line in log if line["event"] == "task_failed"} == {kinds.get(ending, "KeyError")}
    assert SECRET not in str(log)
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    assert [line["event"] for line in log if line["event"] != "task_failed"] == [
        "task_down",
        "task_recovered",
    ]
    await end(task)
    assert task.cancelled()


async def test_task_is_down_only_while_no_iteration_succeeds(
    watched: tuple[Supervisor, list[Any], list[Any]],
) -> None:
    """Two failures in a row are tolerated, three mean down; one successful iteration ends it."""
    tasks, _, _ = watched
    seen, over = [], asyncio.Event()

    async def run(alive: Callable[..., Any]) -> None:
        seen.append(tasks.down)
        if len(seen) == 5:
            alive()
            seen.append(tasks.down)
            over.set()
            await asyncio.Event().wait()
        raise ValueError

    task = tasks.keep("audit", run)
    await asyncio.wait_for(over.wait(), 5)
    assert seen == [[], [], [], ["audit"], ["audit"], []]
    await end(task)


async def test_expected_exception_ends_the_task(watched: tuple[Supervisor, list[Any], list[Any]]) -> None:
    """Exceptions meant for the starter are raised to it, without a retry."""
    tasks, log, _ = watched

    async def run(_alive: Callable[..., Any]) -> None:
        raise EngineError("no engine comes up")

    with pytest.raises(EngineError):
        await tasks.keep("engines", run, ends_with=(EngineError,))
    assert log == []


async def test_failure_of_a_short_task_is_logged(watched: tuple[Supervisor, list[Any], list[Any]]) -> None:
    """The exception of an unawaited task is logged and counted; cancellation is not a failure."""
    tasks, log, _ = watched

    async def fail() -> None:
        raise KeyError(SECRET)

    with pytest.raises(KeyError):
        await tasks.spawn("settlement", fail())
    await end(tasks.spawn("settlement", asyncio.sleep(60)))
    assert [(line["event"], line["task"], line["kind"]) for line in log] == [
        ("task_failed", "settlement", "KeyError")
    ]
    assert SECRET not in str(log)


@pytest.mark.usefixtures("engine")
async def test_event_loop_errors_are_logged_without_their_text(start: Start, until: Until) -> None:
    """An event-loop callback that raises is logged and counted, without its arguments."""
    front = await start()

    def callback(_text: str) -> None:
        raise KeyError(SECRET)

    asyncio.get_running_loop().call_soon(callback, SECRET)

    async def logged() -> bool:
        return any(line["event"] == "task_failed" and line["task"] == "stray" for line in front.log)

    await until(logged)
    assert SECRET not in str(front.log)
    assert b'interpretops_task_failures_total{task="stray"} 1.0' in front.apps.gateway.metrics.render()


async def test_first_of_several_ends_the_others() -> None:
    """The result is that of the finished coroutine, or of the first in order; the others are cancelled."""
    ended = []

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("slow")

    async def fast(value: int) -> int:
        return value

    assert await first_of(slow(), fast(1)) == (1, 1)
    assert await first_of(fast(2), fast(1), slow()) == (0, 2)
    assert ended == ["slow", "slow"]
