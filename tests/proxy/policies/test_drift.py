"""Drift compares live traffic with a window that an operator pinned."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, Start

from interpretops.errors import ConfigError
from proxy.observe.request_context import RequestContext
from proxy.policies.drift import MIN_REQUESTS, WINDOW, psi


@pytest.fixture
async def front(start: Start, tmp_path: Path) -> Front:
    state, audit = tmp_path / "state", tmp_path / "audit.jsonl"
    return await start("calm", **{"paths.state": state, "audit.path": audit})


def note(front: Front, edits: int, times: int, policy: str = "calm") -> None:
    """Record requests with ten evaluated tokens each, as `record_request` does."""
    revision = front.apps.gateway.catalogue.entries["calm"].active.revision
    for _ in range(times):
        front.apps.gateway.drift.note(
            RequestContext("r", policy=policy, revision=revision, evaluated=10, edits=edits)
        )


def shown(front: Front) -> str:
    return front.apps.gateway.metrics.render().decode()


async def pin(front: Front) -> tuple[Any, ...]:
    async with front.admin.post("/admin/policies/calm/baseline") as answer:
        return answer.status, await answer.json()


def test_psi_is_the_known_formula() -> None:
    """Matches the textbook sum; equal histograms of different sizes give 0 apart from the half requests."""
    before, now = [80, 20], [50, 50]
    p, q = [80.5 / 101, 20.5 / 101], [50.5 / 101, 50.5 / 101]
    assert psi(before, now) == pytest.approx(
        sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True))
    )
    assert psi([500, 100], [1000, 200]) < 1e-5


async def test_drift_shows_and_ends_with_a_new_baseline(front: Front) -> None:
    """Changed firing raises the gauge; pinning a new baseline of the same traffic resets it."""
    note(front, 0, MIN_REQUESTS - 1)
    assert (await pin(front))[0] == 409
    note(front, 0, 1)
    status, pinned = await pin(front)
    assert (status, pinned["counts"]) == (200, [MIN_REQUESTS, 0, 0, 0, 0, 0])
    assert 'interpretops_policy_drift_psi{policy="calm"} 0.0' in shown(front)
    note(front, 5, WINDOW)
    assert float(shown(front).split('drift_psi{policy="calm"} ')[1].split()[0]) > 5
    assert f'drift_requests{{policy="calm",window="live"}} {WINDOW}.0' in shown(front)
    (entry,) = (await front.policy_list())["policies"]
    assert entry["drift"]["counts"] == [0, 0, 0, 0, WINDOW, 0]
    await pin(front)
    assert 'interpretops_policy_drift_psi{policy="calm"} 0.0' in shown(front)


async def test_answered_requests_are_counted(front: Front, engine: FakeEngine) -> None:
    """Every answer with a receipt counts for its own policy only; pass-through counts for none."""
    engine.more = {"edits_applied": 1}
    await front.chat(model="tiny-model+calm")
    await front.chat()
    engine.trick = "dies"
    await front.chat(model="tiny-model+calm", stream=True)
    (entry,) = (await front.policy_list())["policies"]
    assert entry["drift"]["counts"] == [0, 0, 0, 0, 1, 0]


async def test_baseline_outlasts_a_restart_and_belongs_to_its_revision(
    front: Front, start: Start, tmp_path: Path
) -> None:
    """Another gateway finds it in the state folder; it does not apply to another revision."""
    note(front, 0, MIN_REQUESTS)
    await pin(front)
    again = await start("calm", **{"paths.state": tmp_path / "state"})
    note(again, 5, MIN_REQUESTS)
    assert 'drift_psi{policy="calm"}' in shown(again)
    path = again.policies / "calm.yaml"
    path.write_text(path.read_text().replace("0.5", "0.25"))
    await again.apps.gateway.intake.reload()
    note(again, 5, MIN_REQUESTS)
    assert 'drift_psi{policy="calm"}' not in shown(again)


async def test_pinning_is_recorded_and_a_malformed_file_is_reported(
    front: Front, start: Start, tmp_path: Path
) -> None:
    """The audit log records who pinned; a malformed baselines file prevents start-up."""
    note(front, 0, MIN_REQUESTS)
    await pin(front)
    log = (tmp_path / "audit.jsonl").read_bytes().splitlines()
    (reported,) = [record for record in map(json.loads, log) if record["event"] == "baseline"]
    assert (reported["policy"], reported["by"]) == ("calm", "anonymous")
    (tmp_path / "state" / "firing-baselines.json").write_text('{"calm": {"revision": "x", "counts": [1]}}')
    with pytest.raises(ConfigError, match="not a valid baselines file"):
        await start("calm", **{"paths.state": tmp_path / "state"})
