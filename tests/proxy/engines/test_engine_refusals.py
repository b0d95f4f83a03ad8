"""Plugin refusals reach the caller with the right status, and the gateway repairs what it can."""

import json

import pytest
from fake_engine import FakeEngine
from running_gateway import Start, Until

from interpretops.engine_api import STATUS, EngineCode

MANDATORY = [{"policy": "calm", "mode": "mandatory"}]
UNWATCHED = {"bindings": MANDATORY, "gateway.watch_policies": False, "gateway.breaker_failures": 2}


@pytest.mark.parametrize("stream", [False, True])
async def test_revision_that_is_no_longer_resident_is_503_and_loaded_again(
    start: Start, engine: FakeEngine, until: Until, stream: bool
) -> None:
    """The caller gets `policy_unavailable`, the breaker stays closed, and the plan is reloaded
    automatically."""
    front = await start("calm", **UNWATCHED)
    for _ in range(3):
        engine.plans.clear()
        status, headers, body = await front.chat(stream=stream)
        body = json.loads(body) if stream else body
        assert (status, body["error"]["code"]) == (503, "policy_unavailable")
        assert headers["Retry-After"] == "1"
        assert front.apps.gateway.fleet.links[str(engine.socket)].breaker.state == "closed"

        async def serves() -> bool:
            return (await front.chat())[0] == 200

        await until(serves)
    assert [entry["event"] for entry in front.log].count("revisions_missed") == 3


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        (EngineCode.NOT_RESIDENT, (503, "policy_unavailable")),
        (EngineCode.POLICY_DEMANDED, (503, "policy_unavailable")),
        (EngineCode.INVALID_SEAL, (502, "engine_failed")),
        (EngineCode.NOT_GENERATING, (502, "engine_failed")),
        ("a code of a newer plugin", (502, "engine_failed")),
    ],
)
async def test_every_refusal_of_a_request_has_its_status(
    start: Start, engine: FakeEngine, code: EngineCode | str, answer: tuple[int, str]
) -> None:
    """No refusal is blamed on the caller, quotes the engine, or opens the breaker."""
    front = await start("calm", **UNWATCHED)
    engine.refusal = code
    for _ in range(3):
        status, _, body = await front.chat()
        assert (status, body["error"]["code"]) == answer
        assert "secret" not in body["error"]["message"]
        if code is EngineCode.NOT_RESIDENT:
            break
    assert front.apps.gateway.fleet.links[str(engine.socket)].breaker.state == "closed"


def test_every_code_has_a_status() -> None:
    """Every engine code maps to a status."""
    assert STATUS.keys() == set(EngineCode)
    assert EngineCode.of("table_full") is EngineCode.TABLE_FULL
    assert EngineCode.of("strange") is EngineCode.FAILED


async def test_own_requests_notice_a_lost_revision_too(
    start: Start, engine: FakeEngine, until: Until
) -> None:
    """A canary may notice first: it fails, and the plan is loaded again."""
    front = await start("calm", **UNWATCHED, **{"canary.interval_s": 3600})
    engine.plans.clear()
    await front.apps.gateway.canary.step("calm")

    async def loaded() -> bool:
        return bool(engine.plans)

    await until(loaded)
