"""Several policies mandatory together: one plan, swapped with its members, or nobody is served."""

from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, Start, Until

from interpretops.errors import EngineError
from proxy.policies.policy_files import Revision

BOTH = [
    {"policy": "calm", "mode": "mandatory"},
    {"policy": "strict", "mode": "mandatory", "match": {"route": "/v1/chat/completions"}},
    {"policy": "*"},
]


def write(folder: Path, name: str, layer: int, scale: float = 0.5) -> None:
    (folder / f"{name}.yaml").write_text(
        f"meta: {{id: {name}}}\ninterventions:\n"
        f"  - {{type: head_scale, selector: {{layer: {layer}, heads: [0]}}, scale: {scale}}}\n"
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "policies"
    path.mkdir()
    write(path, "calm", 1)
    write(path, "strict", 2)
    return path


async def reload(front: Front) -> dict[str, Any]:
    async with front.admin.post("/admin/reload") as answer:
        return await answer.json()


def sites(engine: FakeEngine, revision: str) -> list[int]:
    return sorted(site.layer for site in engine.plans[revision].edits)


async def test_request_under_two_mandatory_policies_gets_both(
    start: Start, engine: FakeEngine, folder: Path
) -> None:
    """One joint plan holds the edits of both; where only one is required, that one applies alone."""
    front = await start(bindings=BOTH)
    _, headers, _ = await front.chat()
    assert headers["X-Steering-Policy"].startswith("calm+strict@")
    assert sites(engine, engine.seen[-1]["vllm_xargs"]["interpretops_revision"]) == [1, 2]
    async with front.public.post("/v1/completions", json={"model": "tiny-model", "prompt": "x"}) as answer:
        assert answer.headers["X-Steering-Policy"].startswith("calm@")
    assert sites(engine, engine.seen[-1]["vllm_xargs"]["interpretops_revision"]) == [1]
    for choice, status in (("calm", 200), ("strict", 200), ("none", 403)):
        asked, headers, _ = await front.chat(headers={"X-Steering-Policy": choice})
        assert asked == status
        assert status == 403 or headers["X-Steering-Policy"].startswith("calm+strict@")


async def test_edit_of_one_member_updates_the_joint_plan_at_once(
    start: Start, engine: FakeEngine, folder: Path
) -> None:
    """After a reload both the single and the joint plan hold the edit, and old rows are freed."""
    front = await start(bindings=BOTH, **{"gateway.watch_policies": False})
    before = set(engine.plans)
    write(folder, "strict", 3)
    assert (await reload(front))["ok"]
    await front.chat()
    now = engine.seen[-1]["vllm_xargs"]["interpretops_revision"]
    assert sites(engine, now) == [1, 3]
    assert now not in before
    assert len(before & set(engine.plans)) == 1


async def test_conflicting_edit_changes_nothing(start: Start, engine: FakeEngine, folder: Path) -> None:
    """Policies that edit the same place are not composed: the last good plans keep serving, and the error is
    reported."""
    front = await start(bindings=BOTH, **{"gateway.watch_policies": False})
    _, before, _ = await front.chat()
    write(folder, "strict", 1)
    report = await reload(front)
    (reported,) = report["failed"].values()
    assert "policies 'calm' and 'strict' cannot be composed: both edit 1.attn_z" in reported
    _, after, _ = await front.chat()
    assert after["X-Steering-Policy"] == before["X-Steering-Policy"]
    assert len(engine.plans) == 3


@pytest.mark.parametrize("trick", ["full", "silent"])
async def test_partly_failed_composition_leaves_no_rows(
    start: Start, engine: FakeEngine, folder: Path, until: Until, trick: str
) -> None:
    """If the last of several plans is refused or its load times out, those loaded before are freed, and
    everything continues as before."""
    write(folder, "third", 3)
    third = {"policy": "third", "mode": "mandatory", "match": {"route": "/v1/completions"}}
    front = await start(bindings=[*BOTH, third], **{"gateway.watch_policies": False})
    before = set(engine.plans)
    assert len(before) == 5
    write(folder, "calm", 1, scale=0.25)
    if trick == "full":
        engine.room = 7
    else:
        engine.trick = "load_unanswered"
    assert not (await reload(front))["ok"]
    engine.trick = ""

    async def as_before() -> bool:
        return set(engine.plans) == before

    await until(as_before)
    (proven,) = front.apps.gateway.fleet.joined
    assert set(proven.resident) == before
    assert proven.unfreed == set()
    status, headers, _ = await front.chat()
    assert (status, headers["X-Steering-Policy"][:12]) == (200, "calm+strict@")
    engine.room = 1000
    assert (await reload(front))["ok"]
    await until(lambda: held(engine, 5))


async def held(engine: FakeEngine, plans: int) -> bool:
    return len(engine.plans) == plans


async def test_conflicting_policies_serve_nobody(start: Start, engine: FakeEngine, folder: Path) -> None:
    """If the policies cannot be composed, nothing is served; readiness and the list report it."""
    write(folder, "strict", 1)
    front = await start(bindings=BOTH)
    status, _, body = await front.chat()
    assert (status, body["error"]["code"]) == (503, "policy_unavailable")
    assert not await front.engine_ready()
    assert "calm+strict" in (await front.policy_list())["not_ready"]
    assert "cannot be composed" in await front.policy_error("strict")
    assert engine.seen == []


async def test_restarted_engine_gets_the_composed_plan_again(
    start: Start, engine: FakeEngine, folder: Path, until: Until
) -> None:
    """After a restart nobody is served before the engine also holds the joint plan."""
    front = await start(bindings=BOTH)
    engine.plans.clear()
    engine.boot_id = "second"
    seen = set()

    async def served() -> bool:
        status, headers, _ = await front.chat()
        seen.add((status, headers.get("X-Steering-Policy", "").split("@")[0]))
        return status == 200 and len(engine.plans) == 3

    await until(served)
    assert seen <= {(200, "calm+strict"), (502, ""), (503, "")}


async def test_failed_restore_of_one_composition_affects_no_other(
    start: Start, engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If one of two lost joint plans is refused, the other serves again."""
    write(folder, "mild", 3)
    completions = {"policy": "mild", "mode": "mandatory", "match": {"route": "/v1/completions"}}
    front = await start(bindings=[*BOTH, completions], **{"gateway.watch_policies": False})
    catalogue = front.apps.gateway.catalogue
    first, second = (catalogue.compositions.active(name) for name in ("calm+mild", "calm+strict"))
    assert first is not None
    assert second is not None
    load = catalogue.residency.load

    async def refuse_one(revision: Revision) -> None:
        if revision is first:
            raise EngineError("no room")
        await load(revision)

    monkeypatch.setattr(catalogue.residency, "load", refuse_one)
    for revision in (first, second):
        engine.plans.pop(revision.revision)
        next(front.apps.gateway.fleet.open).resident.pop(revision.revision)
    report = await reload(front)
    assert [reported for reported in report["failed"].values() if "calm+mild: no room" in reported]
    assert second.revision in engine.plans
    assert (await front.chat())[1]["X-Steering-Policy"].startswith("calm+strict@")
    async with front.public.post("/v1/completions", json={"model": "tiny-model", "prompt": "x"}) as answer:
        assert answer.status == 503
