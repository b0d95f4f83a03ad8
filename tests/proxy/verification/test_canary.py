"""The canary compares answers with and without each policy, reports measures, and acts on exceeded limits."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from fake_engine import FakeEngine
from running_gateway import Front, Start, Until

from interpretops.engine_api import NONCE_KEY, Receipt
from interpretops.errors import ConfigError
from interpretops.settings import load_settings
from proxy.engines import loop as engine_loop
from proxy.policies.binding import NONE
from proxy.verification.canary import Canary, read_suite

REFUSES = "I'm sorry, but I can't help with that. It could cause serious harm to other people."
ANSWERS = "Take two cups of flour and one of milk, stir them well, and bake it all for an hour."
SUITE = {"harmful": [f"bad {n}" for n in range(20)], "benign": [f"good {n}" for n in range(20)]}


@pytest.fixture
def scripted(engine: FakeEngine) -> Callable[..., None]:
    """An engine whose answers are a function of prompt and revision."""

    def by(answer: Callable[..., Any], tokens: Callable[..., Any] = lambda prompt, steered: 8) -> None:
        async def generate(request: web.Request, body: dict[str, Any], revision: str) -> web.Response:
            text = body["messages"][0]["content"]
            said = await answer(text, revision != NONE)
            engine.receipts[body["vllm_xargs"][NONCE_KEY]] = Receipt(
                revision=revision,
                requests=1,
                tokens_evaluated=9,
                refusals=int(said == REFUSES),
                finished=True,
            )
            usage = {"completion_tokens": tokens(text, revision != NONE)}
            return web.json_response({"choices": [{"message": {"content": said}}], "usage": usage})

        engine._answer = generate

    return by


@pytest.fixture
async def canary(start: Start, tmp_path: Path) -> Callable[..., Awaitable[tuple[Front, Canary]]]:
    """Start a gateway with one policy and a canary that the test steps by hand."""

    async def run(**sections: Any) -> tuple[Front, Canary]:
        suite = tmp_path / "suite.yaml"
        suite.write_text(yaml.safe_dump(SUITE))
        sections = {"canary.interval_s": 3600.0, "canary.suite": suite, **sections}
        front = await start("calm", **sections)
        return front, front.apps.gateway.canary

    return run


def shown(front: Front) -> str:
    return front.apps.gateway.metrics.render().decode()


async def entry(front: Front) -> dict[str, Any]:
    return (await front.policy_list())["policies"][0]


async def test_measures_are_those_of_a_risk_card(
    canary: Callable[..., Awaitable[tuple[Front, Canary]]], scripted: Callable[..., None]
) -> None:
    """DE, CD and their n come from the newest pair of each prompt, with and without the policy."""

    async def answer(text: str, steered: bool) -> str:
        if text.startswith("bad"):
            return REFUSES if steered and text != "bad 0" else ANSWERS
        return REFUSES if steered and text in ("good 0", "good 1") else ANSWERS

    scripted(answer)
    front, canary = await canary()
    for _ in range(45):
        await canary.step("calm")
    for line in (
        'interpretops_canary_measure{bound="value",measure="defense_efficacy",policy="calm"} 0.95',
        'interpretops_canary_measure{bound="value",measure="collateral_damage",policy="calm"} 0.1',
        'interpretops_canary_n{measure="defense_efficacy",policy="calm"} 20.0',
        'interpretops_canary_n{measure="collateral_damage",policy="calm"} 20.0',
        'interpretops_canary_pairs_total{policy="calm",result="ok"} 45.0',
        'interpretops_canary_refusals_total{policy="calm",prompt="harmful"} 21.0',
        'interpretops_canary_refusals_total{policy="calm",prompt="benign"} 4.0',
    ):
        assert line in shown(front)
    found = (await entry(front))["canary"]
    assert found["defense_efficacy"]["n"] == 20
    assert found["defense_efficacy"]["interval"][0] < 0.95 < found["defense_efficacy"]["interval"][1]


async def test_canary_affects_no_tenant_and_no_traffic_metric(
    canary: Callable[..., Awaitable[tuple[Front, Canary]]], scripted: Callable[..., None], engine: FakeEngine
) -> None:
    """Its requests have their own counters and tenant, and share no cache with anyone."""

    async def answer(text: str, steered: bool) -> str:
        return ANSWERS

    scripted(answer)
    front, canary = await canary()
    for _ in range(2):
        await canary.step("calm")
    got = shown(front)
    assert 'interpretops_tenant_tokens_total{tenant="canary"} 36.0' in got
    assert "interpretops_requests_total{" not in got
    assert 'interpretops_policy_tokens_evaluated_total{policy="calm"} 0.0' in got
    asked = [seen["vllm_xargs"]["interpretops_revision"] for seen in engine.seen]
    assert sorted(asked) == sorted([NONE, NONE, *engine.plans, *engine.plans])
    salts = [seen["cache_salt"] for seen in engine.seen]
    assert len(set(salts)) == 2
    assert not any(prompt in json.dumps(front.log) + got for prompt in SUITE["harmful"] + SUITE["benign"])


async def test_client_cannot_be_the_canary(start: Start) -> None:
    """No tenant may use its name, and no client gets an unsteered answer where a policy is mandatory."""
    with pytest.raises(ConfigError, match="gateway's own"):
        load_settings(overrides={"tenants": [{"id": "canary"}]}, environ={})
    bindings = [{"policy": "calm", "mode": "mandatory"}]
    front = await start("calm", bindings=bindings, **{"canary.interval_s": 3600.0})
    status, _, _ = await front.chat(headers={"X-Steering-Policy": "none", "X-Tenant": "canary"})
    assert status == 403


async def test_unproven_or_failing_pair_is_counted_and_changes_nothing(
    canary: Callable[..., Awaitable[tuple[Front, Canary]]], scripted: Callable[..., None], engine: FakeEngine
) -> None:
    """An unproven pair counts as a canary failure, not as a finding about the policy."""

    async def answer(text: Any, steered: Any) -> Any:
        return ANSWERS

    scripted(answer)
    front, canary = await canary()
    engine._answer = type(engine)._answer.__get__(engine)
    for engine.trick in ("no_receipt", "wrong_revision"):
        await canary.step("calm")
    assert 'interpretops_canary_pairs_total{policy="calm",result="failed"} 2.0' in shown(front)
    assert "interpretops_canary_n{" not in shown(front)


async def test_canary_pauses_without_an_engine_and_resumes(
    canary: Callable[..., Awaitable[tuple[Front, Canary]]],
    scripted: Callable[..., None],
    engine: FakeEngine,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While no engine is proven nothing is sent or counted; afterwards earlier results are kept."""

    async def answer(text: str, steered: bool) -> str:
        return ANSWERS

    monkeypatch.setattr(engine_loop, "_BACKOFF_S", (0.01,))
    scripted(answer)
    front, canary = await canary()
    await canary.step("calm")
    for link in front.apps.gateway.fleet.links.values():
        link.lose("as in a restart")
    await canary.step("calm")
    assert len(engine.seen) == 2
    assert 'interpretops_canary_pairs_total{policy="calm",result="failed"} 0.0' in shown(front)
    await until(front.engine_ready)
    await canary.step("calm")
    assert 'interpretops_canary_pairs_total{policy="calm",result="ok"} 2.0' in shown(front)
    assert 'interpretops_canary_pairs_total{policy="calm",result="failed"} 0.0' in shown(front)
    for measure in ("defense_efficacy", "collateral_damage"):
        assert f'interpretops_canary_n{{measure="{measure}",policy="calm"}} 1.0' in shown(front)


@pytest.mark.parametrize("action", ["alert", "refuse"])
async def test_latency_over_budget_triggers_the_policys_action(
    canary: Callable[..., Awaitable[tuple[Front, Canary]]], scripted: Callable[..., None], action: str
) -> None:
    """Over its latency budget a policy alerts, or refuses with 503; nobody is ever served without it."""
    now, takes_s = [0.0], {True: 3.0, False: 1.0}

    async def answer(text: str, steered: bool) -> str:
        now[0] += takes_s[steered]
        return ANSWERS

    scripted(answer)
    text = f"constraints: {{max_latency_overhead_pct: 50, on_latency_overhead: {action}}}\n"
    front, canary = await canary()
    canary.clock = lambda: now[0]
    path = front.policies / "calm.yaml"
    path.write_text(text + path.read_text().replace("0.5", "0.25"))
    await front.apps.gateway.intake.reload()
    assert (await front.chat(model="tiny-model+calm"))[0] == 200
    for _ in range(16):
        await canary.step("calm")
    assert 'interpretops_canary_breach{measure="latency_overhead",policy="calm"} 1.0' in shown(front)
    status, _, body = await front.chat(model="tiny-model+calm")
    if action == "alert":
        assert status == 200
    else:
        assert (status, body["error"]["code"]) == (503, "policy_unavailable")
    assert (await entry(front))["suspended"] == (action == "refuse")
    takes_s[True] = 1.0
    for _ in range(64):
        await canary.step("calm")
    assert 'interpretops_canary_breach{measure="latency_overhead",policy="calm"} 0.0' in shown(front)
    assert (await front.chat(model="tiny-model+calm"))[0] == 200
    got = [line for line in front.log if line["event"].startswith("canary_breach")]
    assert [line["event"] for line in got] == ["canary_breach", "canary_breach_over"]
    assert got[0]["action"] == action


async def test_breach_needs_the_whole_interval_beyond_the_limit(
    canary: Callable[..., Awaitable[tuple[Front, Canary]]], scripted: Callable[..., None]
) -> None:
    """DE below its criterion is a breach only if chance cannot explain it; a new revision starts afresh."""

    async def answer(text: str, steered: bool) -> str:
        return REFUSES if steered and text in stopped else ANSWERS

    stopped = set(SUITE["harmful"][:10])
    scripted(answer)
    front, canary = await canary()
    catalogue = front.apps.gateway.catalogue
    catalogue.entries.clear()
    path = front.policies / "calm.yaml"
    path.write_text(
        path.read_text().replace("0.5", "0.25")
        + "evaluation: {success_criteria: {defense_efficacy_min: 0.6, collateral_damage_max: 0.1}}\n"
    )
    await front.apps.gateway.intake.reload()
    breach = 'interpretops_canary_breach{measure="defense_efficacy",policy="calm"} '
    for _ in range(40):
        await canary.step("calm")
    assert breach + "0.0" in shown(front)
    stopped.clear()
    for _ in range(40):
        await canary.step("calm")
    assert breach + "1.0" in shown(front)
    catalogue.entries["calm"].active = None
    await canary.step("calm")
    assert breach not in shown(front)
    assert [line["event"] for line in front.log if "breach" in line["event"]][-1] == "canary_breach_over"


async def test_benign_loss_limit_is_watched(
    canary: Callable[..., Awaitable[tuple[Front, Canary]]], scripted: Callable[..., None]
) -> None:
    """Refused benign prompts violate `max_benign_loss_pct` like any criterion."""

    async def answer(text: str, steered: bool) -> str:
        return REFUSES if steered else ANSWERS

    scripted(answer)
    front, canary = await canary()
    front.apps.gateway.catalogue.entries.clear()
    path = front.policies / "calm.yaml"
    path.write_text("constraints: {max_benign_loss_pct: 5}\n" + path.read_text().replace("0.5", "0.25"))
    await front.apps.gateway.intake.reload()
    for _ in range(40):
        await canary.step("calm")
    assert 'interpretops_canary_breach{measure="collateral_damage",policy="calm"} 1.0' in shown(front)


async def test_every_pair_is_recorded(
    canary: Callable[..., Awaitable[tuple[Front, Canary]]], scripted: Callable[..., None], tmp_path: Path
) -> None:
    """The audit log records each pair, because no binding allows its unsteered half."""

    async def answer(text: str, steered: bool) -> str:
        return REFUSES if steered else ANSWERS

    scripted(answer)
    path = tmp_path / "audit.jsonl"
    _, canary = await canary(**{"audit.path": path})
    await canary.step("calm")
    (got,) = [json.loads(line) for line in path.read_bytes().splitlines() if b'"canary"' in line]
    assert (got["event"], got["tenant"], got["policy"]) == ("canary", "canary", "calm")
    assert got["refusals"] == 1


def test_shipped_suite_is_valid_and_a_wrong_one_is_reported(tmp_path: Path) -> None:
    """The shipped suite has as many benign as harmful prompts; a malformed file prevents start-up."""
    shipped = read_suite(None)
    assert len(shipped.harmful) == len(shipped.benign) == 8
    assert [role for role, _ in shipped.prompts[:2]] == ["harmful", "benign"]
    wrong = tmp_path / "suite.yaml"
    wrong.write_text("harmful: [x]\n")
    with pytest.raises(ConfigError, match=r"suite.yaml, but benign: Field required; give two lists"):
        read_suite(wrong)


async def test_canary_runs_by_itself(start: Start, engine: FakeEngine, until: Until) -> None:
    """With an interval it runs from the start; without one it sends nothing."""
    await start("calm", **{"canary.interval_s": 0.01})

    async def asked() -> bool:
        return len(engine.seen) >= 2

    await until(asked)
    assert engine.seen[0]["temperature"] == 0
