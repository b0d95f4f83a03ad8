"""A revision becomes active on a Risk Card that meets its criteria, or by an override that is recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, PolicyWriter, Start

from interpretops.policy import SuccessCriteria
from interpretops.records.audit_chain import verify
from interpretops.riskcard import RiskCard, card_path, save_card
from interpretops.riskcard.card import (
    BASELINES,
    MEASURES,
    Baseline,
    CircuitReference,
    ModelReference,
    PolicyReference,
    Record,
)
from interpretops.riskcard.measures import absent, rate

CRITERIA = "evaluation: {success_criteria: {collateral_damage_max: 0.05}}\n"


def write_strict(front: Front, scale: float) -> None:
    """A policy that states criteria."""
    path = front.policies / "calm.yaml"
    path.write_text(
        "meta: {id: calm}\ninterventions:\n"
        f"  - {{type: head_scale, selector: {{layer: 1, heads: [0]}}, scale: {scale}}}\n{CRITERIA}"
    )


def write_card(front: Front, revision: str, harmed: int, **more: Any) -> None:
    """Write a Risk Card with ``harmed`` of 400 benign prompts harmed, and further measures."""
    measures = {name: absent("not asked for") for name in MEASURES}
    measures |= {"collateral_damage": rate(harmed, 400), **more}
    card = RiskCard(
        policy=PolicyReference(id="calm", revision=revision, target_class="any"),
        model=ModelReference(name="tiny", fingerprint="f" * 64),
        criteria=SuccessCriteria(collateral_damage_max=0.05),
        measures=measures,
        baselines={kind: Baseline(absent="not asked for") for kind in BASELINES},
        circuit=CircuitReference(absent="not made from one"),
        record=Record(
            command="mechctl eval",
            suite="own",
            suite_sha256="e" * 64,
            commit="0" * 40,
            versions={},
            machine="x",
        ),
    )
    save_card(card, card_path("calm", front.policies))


async def reload(front: Front) -> dict[str, Any]:
    async with front.admin.post("/admin/reload") as answer:
        return await answer.json()


async def entry(front: Front) -> dict[str, Any]:
    return (await front.policy_list())["policies"][0]


async def promote(front: Front, **body: Any) -> tuple[Any, ...]:
    body = {"revision": (await entry(front))["candidate"], **body}
    async with front.admin.post("/admin/policies/calm/promote", json=body) as answer:
        return answer.status, await answer.json()


async def served(front: Front) -> int | str:
    status, headers, _ = await front.chat(model="tiny-model+calm")
    return headers["X-Steering-Policy"].removeprefix("calm@") if status == 200 else status


@pytest.fixture
async def front(start: Start, engine: FakeEngine, tmp_path: Path) -> Front:
    """A gateway with an active policy whose file has been changed to state criteria, and that has no Risk
    Card."""
    front = await start(
        "calm", **{"gateway.watch_policies": False, "audit.path": tmp_path / "audit" / "audit.jsonl"}
    )
    front.first = (await entry(front))["revision"]
    write_strict(front, 0.25)
    front.report = await reload(front)
    return front


async def test_revision_without_a_card_waits(front: Front) -> None:
    """The active revision keeps serving; the new one is a candidate and reports what it waits for."""
    found = await entry(front)
    assert (found["revision"], found["error"]) == (front.first, None)
    assert [listed["state"] for listed in found["revisions"]] == ["active", "candidate"]
    assert "there is no Risk Card" in found["waits_for"]
    assert list(front.report["waiting"].values()) == [found["waits_for"]]
    assert await served(front) == front.first[:12]
    status, body = await promote(front)
    assert (status, body["error"]["code"]) == (409, "admin_refused")
    assert "there is no Risk Card" in body["error"]["message"]
    assert await served(front) == front.first[:12]


async def test_passing_card_activates_the_candidate(front: Front) -> None:
    """A passing card of exactly this revision is needed; other revisions' or failing ones do not count."""
    waiting = (await entry(front))["candidate"]
    write_card(front, front.first, 0)
    assert (await reload(front))["loaded"] == []
    write_card(front, waiting, 40)
    assert (await reload(front))["loaded"] == []
    assert "fails" in (await entry(front))["waits_for"]
    write_card(front, waiting, 2)
    assert (await reload(front))["loaded"] == [f"calm@{waiting[:12]}"]
    found = await entry(front)
    assert (found["revision"], found["previous"], found["candidate"]) == (waiting, front.first, None)
    assert await served(front) == waiting[:12]
    assert found["unproven"] is None


async def test_promised_benign_loss_gates_a_revision(front: Front) -> None:
    """`constraints.max_benign_loss_pct` alone, without other criteria, keeps a revision waiting until a card
    shows that answers, exact matches and BLEU are not lost."""
    path = front.policies / "calm.yaml"
    promise = "constraints: {max_benign_loss_pct: 5}\n"
    path.write_text(path.read_text().replace(CRITERIA, promise).replace("0.25", "0.125"))
    assert (await reload(front))["loaded"] == []
    waiting = (await entry(front))["candidate"]
    write_card(front, waiting, 2)
    assert (await reload(front))["loaded"] == []
    assert "exact_match_loss was not measured" in (await entry(front))["waits_for"]
    write_card(front, waiting, 2, exact_match_loss=rate(20, 100), bleu_loss=rate(0, 100))
    assert (await reload(front))["loaded"] == []
    assert "benign_loss_max: fails by exact_match_loss" in (await entry(front))["waits_for"]
    write_card(front, waiting, 2, exact_match_loss=rate(0, 100), bleu_loss=rate(0, 100))
    assert (await reload(front))["loaded"] == [f"calm@{waiting[:12]}"]
    assert await served(front) == waiting[:12]


async def test_override_is_recorded_before_it_is_done(front: Front, tmp_path: Path) -> None:
    """The audit log records who overrode and why, and the policy is shown as unproven."""
    waiting = (await entry(front))["candidate"]
    for wrong in ({"override": {}}, {"override": {"by": "x", "why": " "}}, {"override": 1}, {"force": True}):
        assert (await promote(front, **wrong))[0] == 400
    for named in (None, waiting[:11], waiting.upper(), waiting + "0", 12):
        assert (await promote(front, revision=named))[0] == 400
    status, body = await promote(front, override={"by": "ada", "why": "hotfix of an outage"})
    assert (status, body["revision"]) == (200, waiting)
    assert "overridden: " in body["unproven"]
    assert await served(front) == waiting[:12]
    assert b'interpretops_policy_unproven{policy="calm"} 1.0' in front.apps.gateway.metrics.render()
    path = tmp_path / "audit" / "audit.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    reported = next(record for record in records if record["event"] == "promote")
    assert reported["override"] == {"by": "ada", "why": "hotfix of an outage"}
    assert (reported["from"], reported["revision"]) == (front.first, waiting)
    after = records[records.index(reported) + 1]
    assert (after["event"], after["revision"]) == ("policy_active", waiting)
    await front.apps.gateway.audit.sync()
    assert verify(path).intact


async def test_override_that_cannot_be_recorded_is_not_done(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a full disk or no audit log, an override activates nothing."""
    audit = front.apps.gateway.audit

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(audit, "_write", full)
    override = {"by": "ada", "why": "x"}
    status, body = await promote(front, override=override)
    assert (status, body["error"]["code"]) == (503, "audit_unavailable")
    assert (await entry(front))["revision"] == front.first
    object.__setattr__(front.apps.gateway, "audit", None)
    assert (await promote(front, override=override))[0] == 409
    assert (await entry(front))["revision"] == front.first


async def test_rolled_back_revision_needs_a_promotion(front: Front) -> None:
    """A passing card does not reactivate a rolled-back revision; a promotion does."""
    waiting = (await entry(front))["candidate"]
    write_card(front, waiting, 2)
    await reload(front)
    async with front.admin.post("/admin/policies/calm/rollback") as answer:
        assert answer.status == 200
    await reload(front)
    assert await served(front) == front.first[:12]
    assert (await promote(front))[0] == 200
    assert await served(front) == waiting[:12]


async def test_file_changed_back_leaves_no_candidate(front: Front, policy_writer: PolicyWriter) -> None:
    """The candidate is dropped when the file is changed back to the active content."""
    policy_writer(front.policies, "calm")
    await reload(front)
    assert (await entry(front))["candidate"] is None


async def test_first_start_serves_without_a_card_and_warns(
    start: Start, engine: FakeEngine, tmp_path: Path
) -> None:
    """By default a policy without a Risk Card is served, with a warning and a metric."""
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "calm.yaml").write_text(
        "meta: {id: calm}\ninterventions:\n"
        f"  - {{type: head_scale, selector: {{layer: 1, heads: [0]}}, scale: 0}}\n{CRITERIA}"
    )
    front = await start()
    assert "there is no Risk Card" in (await entry(front))["unproven"]
    assert await served(front) != 503
    assert any(line["event"] == "policy_unproven" for line in front.log)
    assert b'interpretops_policy_unproven{policy="calm"} 1.0' in front.apps.gateway.metrics.render()


async def test_cards_can_be_required_from_the_first_start(
    start: Start, engine: FakeEngine, tmp_path: Path
) -> None:
    """With `policies.require_cards` nothing is served without a passing card, even at the first start."""
    folder = tmp_path / "policies"
    folder.mkdir()
    (folder / "calm.yaml").write_text(
        "meta: {id: calm}\ninterventions:\n"
        f"  - {{type: head_scale, selector: {{layer: 1, heads: [0]}}, scale: 0}}\n{CRITERIA}"
    )
    front = await start(**{"policies.require_cards": True, "gateway.watch_policies": False})
    assert await served(front) == 503
    write_card(front, (await entry(front))["candidate"], 2)
    await reload(front)
    assert await served(front) == (await entry(front))["revision"][:12]


async def test_promotion_activates_the_reviewed_revision_or_nothing(front: Front, tmp_path: Path) -> None:
    """If the candidate changed after the review, an override of the old one activates nothing."""
    reviewed = (await entry(front))["candidate"]
    write_strict(front, 0.125)
    await reload(front)
    newer = (await entry(front))["candidate"]
    assert newer not in (reviewed, front.first)
    override = {"by": "ada", "why": "reviewed"}
    for body in ({"override": override}, {"to": "shadow"}, {}):
        status, reported = await promote(front, revision=reviewed[:12], **body)
        assert (status, reported["error"]["code"]) == (409, "admin_refused")
        assert f"calm@{newer[:12]} is the candidate now" in reported["error"]["message"]
    assert await served(front) == front.first[:12]
    async with front.admin.post("/admin/policies/calm/promote", json={"override": override}) as answer:
        assert answer.status == 400
        assert "`candidate` in GET /admin/policies" in (await answer.json())["error"]["message"]
    assert (await promote(front, revision=newer[:12], override=override))[0] == 200
    assert await served(front) == newer[:12]
    records = [json.loads(line) for line in (tmp_path / "audit" / "audit.jsonl").read_text().splitlines()]
    promoted = [record["revision"] for record in records if record["event"] == "promote"]
    assert [record["asked"] for record in records if record["event"] == "promote_failed"] == [
        reviewed[:12]
    ] * 3
    became = [record["revision"] for record in records if record["event"] == "policy_active"]
    assert promoted == [newer]
    assert became[-1] == newer
    assert reviewed not in became


async def test_candidate_that_changes_during_the_promotion_is_not_served(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file changes between the audit record and the activation: refused, and recorded as failed."""
    reviewed = (await entry(front))["candidate"]
    audit, recorded = front.apps.gateway.audit, []

    async def slowly(event: str, **fields: Any) -> None:
        recorded.append((event, fields["revision"]))
        write_strict(front, 0.125)
        await front.apps.gateway.intake.reload()

    monkeypatch.setattr(audit, "append_durably", slowly)
    status, reported = await promote(front, revision=reviewed, override={"by": "ada", "why": "reviewed"})
    assert (status, reported["error"]["code"]) == (409, "admin_refused")
    assert "has replaced" in reported["error"]["message"]
    assert recorded == [("promote", reviewed)]
    assert await served(front) == front.first[:12]


async def test_rollback_may_name_its_target_and_records_both_ends(front: Front, tmp_path: Path) -> None:
    """A rollback that names its target never activates another; the audit log records both revisions."""
    waiting = (await entry(front))["candidate"]
    write_card(front, waiting, 2)
    await reload(front)
    for named, expected in ((waiting[:12], 409), ("nonsense", 400), (front.first[:12], 200)):
        async with front.admin.post("/admin/policies/calm/rollback", json={"revision": named}) as answer:
            assert answer.status == expected
    assert await served(front) == front.first[:12]
    records = [json.loads(line) for line in (tmp_path / "audit" / "audit.jsonl").read_text().splitlines()]
    (reported,) = [record for record in records if record["event"] == "rollback"]
    assert (reported["from"], reported["revision"]) == (waiting, front.first)
