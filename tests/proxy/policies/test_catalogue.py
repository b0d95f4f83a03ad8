"""Loading, reloading and withdrawing policies, with requests in progress."""

import asyncio
import shutil
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, PolicyWriter, Start, Until

from interpretops.plan.plan import Plan
from interpretops.policy.schema import Policy
from proxy.errors import PolicyUnavailable
from proxy.policies import policy_files, policy_reading
from proxy.policies.policy_files import Revision

CHANGED = 0.25


async def reload(front: Front, status: int = 200) -> dict[str, Any]:
    async with front.admin.post("/admin/reload") as answer:
        assert answer.status == status
        return await answer.json()


async def revision_of(front: Front, policy: str) -> str:
    return next(
        entry["revision"] for entry in (await front.policy_list())["policies"] if entry["id"] == policy
    )


async def test_reload_has_taken_effect_when_it_responds(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter
) -> None:
    """Every request sent after the reload's response gets the new revision."""
    front = await start("calm", **{"gateway.watch_policies": False})
    old = await revision_of(front, "calm")
    policy_writer(front.policies, "calm", CHANGED)
    report = await reload(front)
    _, headers, _ = await front.chat(model="tiny-model+calm")
    new = await revision_of(front, "calm")
    assert report == {"ok": True, "loaded": [f"calm@{new[:12]}"], "removed": [], "failed": {}, "waiting": {}}
    assert headers["X-Steering-Policy"] == f"calm@{new[:12]}"
    assert new != old


async def test_requests_in_flight_keep_their_revision(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter
) -> None:
    """A request accepted before a reload finishes under its revision, which is retired only then."""
    front = await start("calm", **{"gateway.watch_policies": False})
    old = await revision_of(front, "calm")
    engine.trick = "hold"
    early = asyncio.create_task(front.chat(model="tiny-model+calm"))
    await engine.arrived.wait()
    policy_writer(front.policies, "calm", CHANGED)
    await reload(front)
    assert old in engine.plans
    engine.trick = ""
    engine.go_on.set()
    status, headers, _ = await early
    assert (status, headers["X-Steering-Policy"]) == (200, f"calm@{old[:12]}")
    await asyncio.wait_for(engine.let_go.wait(), 5)
    assert engine.retired == [old]
    assert await revision_of(front, "calm") in engine.plans


@pytest.mark.parametrize(
    "damage",
    [
        "meta: {id: calm}\ninterventions: [",
        "meta: {id: calm}\nunknown: 1\n",
        "",
        "meta: {id: calm}\ninterventions:\n"
        "  - {type: head_scale, selector: {layer: 99, heads: [0]}, scale: 1}\n",
    ],
)
async def test_broken_edit_keeps_the_old_revision(start: Start, engine: FakeEngine, damage: str) -> None:
    """A broken file changes nothing, and is reported in the list, the log and a metric."""
    front = await start("calm", **{"gateway.watch_policies": False})
    old = await revision_of(front, "calm")
    (front.policies / "calm.yaml").write_text(damage)
    report = await reload(front)
    (entry,) = (await front.policy_list())["policies"]
    assert not report["ok"]
    assert (entry["revision"], entry["state"]) == (old, "active")
    assert "calm.yaml" in entry["error"]
    assert (await front.chat(model="tiny-model+calm"))[0] == 200
    assert any(line["event"] == "policy_refused" for line in front.log)
    metrics = front.apps.gateway.metrics.render()
    assert b'interpretops_policy_broken{policy="calm"} 1.0' in metrics
    assert b'interpretops_policy_reloads_total{result="failed"} 1.0' in metrics


@pytest.mark.parametrize("trick", ["table_full", "wrong_digest", "same_half", "one_half"])
async def test_revision_that_the_engine_does_not_attest_never_serves(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter, trick: str
) -> None:
    """If the engine cannot hold a plan or attests a wrong digest (or of two shards one twice, or none), the
    old revision stays."""
    front = await start("calm", **{"gateway.watch_policies": False})
    old = await revision_of(front, "calm")
    engine.trick = trick
    policy_writer(front.policies, "calm", CHANGED)
    assert not (await reload(front))["ok"]
    assert await revision_of(front, "calm") == old
    engine.trick = "two_ranks" if "half" in trick else ""
    assert (await reload(front))["ok"]
    assert await revision_of(front, "calm") != old


async def test_new_file_that_does_not_compile_is_known_but_unavailable(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter
) -> None:
    """A policy without a valid revision answers 503; a second file with its id changes nothing."""
    front = await start("calm", **{"gateway.watch_policies": False})
    policy_writer(front.policies, "bad", heads="[9]")
    (front.policies / "copy.yaml").write_text((front.policies / "calm.yaml").read_text())
    report = await reload(front)
    assert set(report["failed"]) == {str(front.policies / name) for name in ("bad.yaml", "copy.yaml")}
    status, headers, body = await front.chat(model="tiny-model+bad")
    assert (status, body["error"]["code"]) == (503, "policy_unavailable")
    assert headers["Retry-After"] == "1"
    assert (await front.chat(model="tiny-model+calm"))[0] == 200


async def test_policy_named_none_is_refused(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter
) -> None:
    """No policy may use the name that requests an unsteered answer."""
    front = await start(**{"gateway.watch_policies": False})
    policy_writer(front.policies, "none")
    assert not (await reload(front))["ok"]
    assert engine.plans == {}


async def test_deleted_file_withdraws_its_policy_unless_bindings_require_it(
    start: Start, engine: FakeEngine
) -> None:
    """A deleted optional policy is gone; a required one keeps serving, as do all if the folder disappears."""
    bindings = [{"policy": "strict", "mode": "default"}, {"policy": "*"}]
    front = await start("calm", "strict", bindings=bindings, **{"gateway.watch_policies": False})
    strict = await revision_of(front, "strict")
    (front.policies / "calm.yaml").unlink()
    (front.policies / "strict.yaml").unlink()
    report = await reload(front)
    assert report["removed"] == ["calm"]
    assert "strict.yaml: deleted, but bindings require" in str(report["failed"])
    assert (await front.chat(model="tiny-model+calm"))[0] == 400
    shutil.rmtree(front.policies)
    assert not (await reload(front))["ok"]
    _, headers, _ = await front.chat()
    assert headers["X-Steering-Policy"] == f"strict@{strict[:12]}"


async def test_required_policy_cannot_be_renamed(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter
) -> None:
    """A new id in the file of a required policy is an error; of an optional one, it is another policy."""
    bindings = [{"policy": "strict", "mode": "default"}, {"policy": "*"}]
    front = await start("calm", "strict", bindings=bindings, **{"gateway.watch_policies": False})
    strict = await revision_of(front, "strict")
    for name in ("calm", "strict"):
        path = front.policies / f"{name}.yaml"
        path.write_text(path.read_text().replace(name, f"{name}-2"))
    report = await reload(front)
    assert report["removed"] == ["calm"]
    assert [label[:7] for label in report["loaded"]] == ["calm-2@"]
    assert "bindings require 'strict'" in str(report["failed"])
    assert await revision_of(front, "strict") == strict


async def test_plan_refused_after_a_restart_is_loaded_later(
    start: Start, engine: FakeEngine, until: Until
) -> None:
    """After a restart a policy that the engine refuses is unavailable until the engine accepts it."""
    front = await start("calm", **{"gateway.watch_policies": False})
    engine.plans.clear()
    engine.trick, engine.boot_id = "table_full", "second"

    async def status(wanted: int) -> bool:
        return (await front.chat(model="tiny-model+calm"))[0] == wanted

    await until(lambda: front.policy_error("calm"))
    assert (await front.chat(model="tiny-model+calm"))[2]["error"]["code"] in (
        "policy_unavailable",
        "engine_not_ready",
    )
    engine.trick = ""
    await until(front.engine_ready)
    await reload(front)
    assert await status(200)
    assert not await front.policy_error("calm")


async def test_rollback_and_promote(start: Start, engine: FakeEngine, policy_writer: PolicyWriter) -> None:
    """Rollback serves the previous revision and keeps the newer one as candidate; promote restores it."""
    front = await start("calm", **{"gateway.watch_policies": False})
    old = await revision_of(front, "calm")
    policy_writer(front.policies, "calm", CHANGED)
    await reload(front)
    new = await revision_of(front, "calm")

    async def change(what: str, status: int = 200, **body: str) -> dict[str, Any]:
        async with front.admin.post(f"/admin/policies/calm/{what}", json=body) as answer:
            assert answer.status == status
            return await answer.json()

    back = await change("rollback")
    assert (back["revision"], back["candidate"], back["previous"]) == (old, new, None)
    await change("rollback", 409)
    assert (await reload(front))["loaded"] == []
    assert await revision_of(front, "calm") == old
    assert (await front.chat(model="tiny-model+calm"))[1]["X-Steering-Policy"] == f"calm@{old[:12]}"
    forward = await change("promote", revision=new[:12])
    assert (forward["revision"], forward["previous"], forward["candidate"]) == (new, old, None)
    assert (await front.chat(model="tiny-model+calm"))[1]["X-Steering-Policy"] == f"calm@{new[:12]}"
    await change("promote", 409, revision=new)
    await change("promote", 400)
    async with front.admin.post("/admin/policies/unknown/rollback") as answer:
        assert answer.status == 400


async def test_half_written_file_is_read_again(
    start: Start, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that changes while it is read is not reported as broken."""
    front = await start("calm", **{"gateway.watch_policies": False})
    path = front.policies / "calm.yaml"
    whole = path.read_text().replace("0.5", "0.125")
    path.write_text("meta: {id: ")
    compile_file = policy_reading.compile_file

    def finish_writing(*args: Any) -> Revision:
        try:
            return compile_file(*args)
        finally:
            path.write_text(whole)

    monkeypatch.setattr(policy_reading, "compile_file", finish_writing)
    report = await reload(front)
    assert (report["ok"], len(report["loaded"])) == (True, 1)


async def test_edit_is_noticed_without_a_reload_call(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter, until: Until
) -> None:
    """Writing a file is enough; a file with unchanged content is not loaded again."""
    front = await start("calm")
    old = await revision_of(front, "calm")
    policy_writer(front.policies, "calm", CHANGED)

    async def changed() -> bool:
        return await revision_of(front, "calm") != old

    await until(changed)
    (front.policies / "calm.yaml").touch()
    policy_writer(front.policies, "later")

    async def later_is_there() -> bool:
        return "later" in front.apps.gateway.catalogue.entries

    await until(later_is_there)
    active = [line["policy"] for line in front.log if line["event"] == "policy_active"]
    assert active == ["calm", "calm", "later"]


async def test_unloaded_policy_cannot_be_pinned(start: Start, engine: FakeEngine) -> None:
    """A revision that is not resident in the engine is never used."""
    front = await start("calm")
    held = front.apps.gateway.catalogue
    front.apps.gateway.fleet.current.resident.clear()
    with pytest.raises(PolicyUnavailable), held.pin("calm"):
        pass


async def test_file_that_crashes_the_compiler_affects_no_other(
    start: Start, engine: FakeEngine, policy_writer: PolicyWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unexpected error is reported with file, type and place; later files are still served."""
    compile_policy = policy_files.compile_policy

    def breaks(policy: Policy, **fields: Any) -> Plan:
        if policy.meta.id == "calm":
            raise KeyError("secret")
        return compile_policy(policy, **fields)

    monkeypatch.setattr(policy_files, "compile_policy", breaks)
    front = await start("calm", "strict", **{"gateway.watch_policies": False})
    assert (await front.chat(model="tiny-model+strict"))[0] == 200
    error = await front.policy_error("calm")
    assert "calm.yaml: unexpected KeyError in " in error
    assert "secret" not in error
    monkeypatch.setattr(policy_files, "compile_policy", compile_policy)
    assert len((await reload(front))["loaded"]) == 1
