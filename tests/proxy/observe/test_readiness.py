"""Readiness is consistent: `/readyz`, metrics, log and actual responses never contradict each other."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, Start, Until

from proxy.errors import Refusal
from proxy.observe.readiness import CODES

MANDATORY = [{"policy": "calm", "mode": "mandatory"}]
CAUSES = {
    "audit_unavailable": {"audit_failing"},
    "keys_unavailable": {"keys_unusable"},
    "engine_not_ready": {"engine_not_ready", "engines_left_alone"},
    "limits_unavailable": {"limits_away"},
    "policy_unavailable": {"policy_missing", "policy_suspended"},
}
"""Errors that can affect every request, and the readiness reasons that report them."""


async def readiness(front: Front) -> list[str]:
    """The readiness codes, after checking that log and both gauges agree."""
    async with front.public.get("/readyz") as answer:
        reported = await answer.json()
        assert (answer.status == 200) is reported["ready"] is (not reported["reasons"])
    async with front.admin.get("/metrics") as answer:
        shown = await answer.text()
    assert f"interpretops_ready {float(reported['ready'])}" in shown
    for code in CODES:
        assert f'interpretops_not_ready{{reason="{code}"}} {float(code in reported["reasons"])}' in shown
    front.apps.gateway.readiness.log_changes()
    lines = [line for line in front.log if line["event"] in ("gateway_ready", "gateway_not_ready")]
    assert lines[-1].get("reasons", []) == reported["reasons"]
    return reported["reasons"]


async def refused(front: Front) -> str | None:
    status, _, body = await front.chat()
    return None if status == 200 else body["error"]["code"]


def test_every_error_that_can_affect_all_requests_has_a_reason() -> None:
    """A new 503 error without a readiness reason fails here."""
    kinds = list(Refusal.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert {kind.code for kind in kinds if kind.status == 503} == set(CAUSES)
    assert set().union(*CAUSES.values()) <= set(CODES)


async def test_wrong_name_of_a_mandatory_policy_is_reported_everywhere(start: Start) -> None:
    """A binding names a policy that does not exist: every source reports not ready, with the reason."""
    front = await start("calm", bindings=[{"policy": "clam", "mode": "mandatory"}])
    assert await refused(front) == "policy_unavailable"
    assert await readiness(front) == ["policy_missing"]
    reported = [line for line in front.log if line["event"] == "gateway_not_ready"][-1]
    assert (reported["log_level"], reported["why"]) == (
        "error",
        ["bindings require policies that are not loaded: clam"],
    )
    listed = await front.policy_list()
    assert listed["not_ready"] == "bindings require policies that are not loaded: clam"


async def test_change_is_logged_once(start: Start, engine: FakeEngine, until: Until) -> None:
    """One line when the gateway becomes not ready, one when it is ready again, none in between."""
    front = await start("calm", bindings=MANDATORY)
    assert await readiness(front) == []
    engine.trick = "unhealthy"

    async def lost() -> bool:
        return not await front.engine_ready()

    await until(lost)
    for _ in range(3):
        assert await readiness(front) == ["engine_not_ready"]
    engine.trick = ""
    await until(front.engine_ready)
    assert await readiness(front) == []
    levels = [
        (line["event"], line["log_level"]) for line in front.log if line["event"].startswith("gateway_")
    ]
    assert levels == [
        ("gateway_not_ready", "info"),
        ("gateway_ready", "info"),
        ("gateway_not_ready", "error"),
        ("gateway_ready", "info"),
    ]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A disk that is full while the list is not empty."""
    full = []
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        if full and data.startswith(b'{"seq"'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    return full


@pytest.mark.parametrize("on_failure", ["refuse", "continue"])
async def test_audit_log_that_cannot_be_written(
    start: Start, tmp_path: Path, disk: list[Any], until: Until, on_failure: str
) -> None:
    """Not ready while every request is refused for it, and ready again by itself; otherwise always ready."""
    settings = {"audit.path": tmp_path / "audit.jsonl", "audit.on_failure": on_failure}
    front = await start("calm", **settings)
    assert await readiness(front) == []
    disk.append("full")
    await front.chat()
    strict = on_failure == "refuse"
    assert await refused(front) == ("audit_unavailable" if strict else None)
    assert await readiness(front) == (["audit_failing"] if strict else [])
    disk.clear()
    # A not-ready endpoint gets no requests, so it must detect recovery by itself.
    await until(front.engine_ready)
    assert await refused(front) is None


async def test_failed_audit_log_recovers_without_requests(
    start: Start, tmp_path: Path, disk: list[Any], until: Until
) -> None:
    """A change refused because it could not be recorded is not recorded later; the log recovers on its
    own."""
    front = await start("calm", **{"audit.path": tmp_path / "audit.jsonl"})
    audit = front.apps.gateway.audit
    await audit.sync()
    disk.append("full")
    async with front.admin.post("/admin/policies/calm/rollback") as answer:
        assert (await answer.json())["error"]["code"] == "audit_unavailable"
    assert await readiness(front) == ["audit_failing"]
    disk.clear()
    await until(front.engine_ready)
    await audit.sync()
    assert '"event":"audit_recovered"' in (tmp_path / "audit.jsonl").read_text()


async def test_not_ready_while_all_breakers_are_open(start: Start, engine: FakeEngine, until: Until) -> None:
    """While every engine is skipped, all requests are refused; then one request is tried."""
    front = await start("calm", **{"gateway.breaker_failures": 2, "gateway.breaker_open_s": 0.5})
    engine.trick = "busy"
    assert [await refused(front) for _ in range(3)] == ["engine_failed", "engine_failed", "engine_not_ready"]
    assert await readiness(front) == ["engines_left_alone"]
    engine.trick = ""
    await until(front.engine_ready)
    assert await refused(front) is None
    assert await readiness(front) == []


async def test_not_ready_while_a_mandatory_policy_is_suspended(start: Start) -> None:
    """A suspended policy refuses everyone for whom it is mandatory, and readiness reports it."""
    front = await start("calm", bindings=MANDATORY)
    catalogue = front.apps.gateway.catalogue
    catalogue.suspended["calm"] = catalogue.entries["calm"].active.revision
    assert await refused(front) == "policy_unavailable"
    assert await readiness(front) == ["policy_suspended"]
    catalogue.suspended.clear()
    assert await readiness(front) == []
