"""A shadow repeats requests of the active revision, reaches nobody, and counts how answers differ."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, PolicyWriter, Start, Until


@pytest.fixture
async def front(start: Start, engine: FakeEngine, tmp_path: Path) -> Front:
    """A gateway with an active policy and a candidate that waits for its card; every request is sampled."""
    front = await start("calm", **{"gateway.watch_policies": False, "policies.shadow_share": 1.0})
    path = front.policies / "calm.yaml"
    text = path.read_text().replace("0.5", "0.25")
    path.write_text(text + "evaluation: {success_criteria: {collateral_damage_max: 0.05}}\n")
    async with front.admin.post("/admin/reload"):
        pass
    return front


async def entry(front: Front) -> dict[str, Any]:
    return (await front.policy_list())["policies"][0]


async def cast(front: Front, **body: str) -> int:
    body = {"revision": (await entry(front))["candidate"] or "0" * 12, "to": "shadow", **body}
    async with front.admin.post("/admin/policies/calm/promote", json=body) as answer:
        return answer.status


def asked(engine: FakeEngine) -> list[str]:
    return [seen["vllm_xargs"]["interpretops_revision"] for seen in engine.seen]


async def test_shadow_answers_nobody_and_is_counted(front: Front, engine: FakeEngine, until: Until) -> None:
    """The caller gets only the active revision's answer; the shadow's result is a count and a metric."""
    found = await entry(front)
    assert await cast(front) == 200
    assert [listed["state"] for listed in (await entry(front))["revisions"]] == ["active", "shadow"]
    for fields, total in (
        ({"temperature": 0}, {"changed": 1}),
        ({"temperature": 1}, {"changed": 1, "uncompared": 1}),
        ({"temperature": 0, "stream": True}, {"changed": 1, "uncompared": 2}),
    ):
        engine.seen.clear()
        _, headers, body = await front.chat(model="tiny-model+calm", **fields)
        assert headers["X-Steering-Policy"] == f"calm@{found['revision'][:12]}"
        assert found["candidate"] not in json.dumps(body)

        async def counted(total: dict[str, int] = total) -> bool:
            tally = (await entry(front))["shadow"]
            return tally is not None and tally["requests"] == total

        await until(counted)
        assert asked(engine) == [found["revision"], found["candidate"]]
        assert not engine.seen[1].get("stream")
    assert (await entry(front))["shadow"]["revision"] == found["candidate"]
    metrics = front.apps.gateway.metrics.render()
    assert b'interpretops_shadow_requests_total{policy="calm",result="changed"} 1.0' in metrics


@pytest.mark.parametrize(
    "answer",
    [
        [],
        7,
        None,
        {"choices": 1, "output": 3},
        {"output": [1]},
        {"output": {"a": 1}},
        {"output": [None, "x"]},
    ],
)
async def test_malformed_shadow_answer_is_counted(
    front: Front, engine: FakeEngine, until: Until, answer: Any
) -> None:
    """A malformed shadow answer is counted as failed, not ignored."""
    waiting = (await entry(front))["candidate"]
    assert await cast(front) == 200

    def script(body: dict[str, Any]) -> list[Any]:
        shadow = body["vllm_xargs"]["interpretops_revision"] == waiting
        return [answer if shadow else {"choices": [], "usage": {}}]

    engine.script = script
    assert (await front.chat(model="tiny-model+calm", temperature=0))[0] == 200

    async def counted() -> bool:
        tally = (await entry(front))["shadow"]
        return tally is not None and sum(tally["requests"].values()) == 1

    await until(counted)
    assert not [line for line in front.log if line["event"] == "task_failed"]


async def test_shadow_counts_refusals_beside_the_active_revisions(
    front: Front, engine: FakeEngine, until: Until
) -> None:
    """Refusals of both revisions are counted from the receipts of the same requests, and recorded."""
    await cast(front)
    engine.more = {"refusals": 1}
    assert (await front.chat(model="tiny-model+calm"))[0] == 200

    async def counted() -> bool:
        tally = (await entry(front))["shadow"]
        return tally is not None and tally["refusals"] == {"active": 1, "shadow": 1}

    await until(counted)


async def test_shadow_that_fails_disturbs_no_answer(front: Front, engine: FakeEngine, until: Until) -> None:
    """Whatever happens to the shadow, the caller gets the answer; the failure is counted."""
    await cast(front)
    candidate = (await entry(front))["candidate"]
    engine.plans.pop(candidate)
    assert (await front.chat(model="tiny-model+calm"))[0] == 200

    async def counted() -> bool:
        tally = (await entry(front))["shadow"]
        return tally is not None and tally["requests"] == {"failed": 1}

    await until(counted)


async def test_running_shadow_keeps_its_rows(
    front: Front, engine: FakeEngine, policy_writer: PolicyWriter, until: Until
) -> None:
    """A shadow's rows are freed only after its last request, as for any revision."""
    await cast(front)
    found = await entry(front)
    before, candidate = found["revision"], found["candidate"]
    engine.trick = f"hold {candidate}"
    await front.chat(model="tiny-model+calm")

    async def under_way() -> bool:
        return candidate in asked(engine)

    await until(under_way)
    policy_writer(front.policies, "calm", 0.75)
    async with front.admin.post("/admin/reload"):
        pass

    async def freed_the_active_one() -> bool:
        return before in engine.retired

    await until(freed_the_active_one)
    assert candidate in engine.plans
    engine.go_on.set()

    async def freed() -> bool:
        return candidate not in engine.plans

    await until(freed)
    assert front.apps.gateway.shadows.tallies["calm"].requests == {"uncompared": 1}


async def test_only_requests_of_its_policy_are_repeated(front: Front, engine: FakeEngine) -> None:
    """Pass-through, other policies, and candidates that are not in shadow have no shadow requests."""
    await front.chat(model="tiny-model+calm")
    await cast(front)
    await front.chat()
    assert len(engine.seen) == 2


async def test_shadow_ends_with_its_candidate(
    front: Front, engine: FakeEngine, policy_writer: PolicyWriter, until: Until
) -> None:
    """A changed file frees the shadow's rows; a promotion needs its card as before."""
    await cast(front)
    candidate = (await entry(front))["candidate"]
    assert candidate in engine.plans
    async with front.admin.post("/admin/policies/calm/promote", json={"revision": candidate}) as answer:
        assert answer.status == 409
    policy_writer(front.policies, "calm", 0.75)
    async with front.admin.post("/admin/reload"):
        pass

    async def freed() -> bool:
        return candidate not in engine.plans

    await until(freed)
    assert (await entry(front))["candidate"] is None
    assert await cast(front) == 409
    assert await cast(front, to="retired") == 400


async def test_shadow_outlives_a_reload(
    front: Front, engine: FakeEngine, policy_writer: PolicyWriter, until: Until
) -> None:
    """Reading the same file again ends no shadow, and its rows are freed when the file changes then."""
    assert await cast(front) == 200
    candidate = (await entry(front))["candidate"]
    async with front.admin.post("/admin/reload"):
        pass
    assert [listed["state"] for listed in (await entry(front))["revisions"]] == ["active", "shadow"]
    policy_writer(front.policies, "calm", 0.75)
    async with front.admin.post("/admin/reload"):
        pass

    async def freed() -> bool:
        return candidate not in engine.plans

    await until(freed)
