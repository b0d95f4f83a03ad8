"""Nothing computed at prompt positions is returned if the policy would have changed it in an answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, Start, Until

from proxy.openai_api.routes import ROUTES
from proxy.relay.prompt_disclosure import prompt_reading_field

CHAT, COMPLETIONS = ROUTES["/v1/chat/completions"], ROUTES["/v1/completions"]
ASKED = {
    CHAT.path: {"messages": [{"role": "user", "content": "hi"}]},
    COMPLETIONS.path: {"prompt": "hi"},
}
READS = [
    *((path, {"prompt_logprobs": value}) for path in ASKED for value in (0, 1, -1, True, 1.0, "1", False)),
    (CHAT.path, {"echo": True}),
    (CHAT.path, {"echo": 1}),
    (CHAT.path, {"echo": "true", "logprobs": False}),
    (CHAT.path, {"echo": True, "logprobs": True, "top_logprobs": 5}),
    *((COMPLETIONS.path, {"echo": True, "logprobs": value}) for value in (0, 1, -1, True)),
    (COMPLETIONS.path, {"echo": "yes", "logprobs": 1}),
    (COMPLETIONS.path, {"echo": True, "logprobs": 1, "max_tokens": 0}),
    (COMPLETIONS.path, {"echo": True, "prompt_logprobs": 1, "max_tokens": 0}),
    (COMPLETIONS.path, {"echo": True, "logprobs": 1, "n": 4}),
]
READS_NOT = [
    (CHAT.path, {"prompt_logprobs": None, "echo": False, "logprobs": True, "top_logprobs": 20}),
    (CHAT.path, {"logprobs": True, "logprob_token_ids": [5], "return_token_ids": True}),
    (COMPLETIONS.path, {"echo": True}),
    (COMPLETIONS.path, {"echo": True, "max_tokens": 0, "logprobs": None}),
    (COMPLETIONS.path, {"logprobs": 5, "return_token_ids": True, "echo": None}),
]
LATE = """
meta: {{id: {name}}}
gates: {{late: {{phase: decode}}}}
interventions:
  - {{type: head_scale, selector: {{layer: {layer}, heads: [0]}}, scale: 0.5, gate: late}}
"""


def write_late(folder: Path, name: str = "late", layer: int = 2) -> None:
    """Write a policy that acts on generated tokens only."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(LATE.format(name=name, layer=layer))


async def ask(
    front: Front,
    path: str,
    fields: dict[str, Any],
    stream: bool = False,
    headers: dict[str, str] | None = None,
) -> tuple[int, str]:
    body = {"model": "tiny-model", "stream": stream, **ASKED[path], **fields}
    async with front.public.post(path, json=body, headers=headers) as answer:
        return answer.status, await answer.text()


def is_refused(reported: tuple[int, str], policy: str) -> bool:
    error = json.loads(reported[1])["error"]
    return (
        (reported[0], error["code"]) == (400, "field_not_allowed")
        and error["param"] in ("prompt_logprobs", "echo")
        and error["param"] in error["message"]
        and repr(policy) in error["message"]
        and "remove" in error["message"]
    )


@pytest.mark.parametrize(("path", "fields"), READS, ids=str)
@pytest.mark.parametrize("stream", [False, True])
async def test_prompt_readings_are_refused_under_a_policy_that_edits_only_answers(
    start: Start, engine: FakeEngine, tmp_path: Path, path: str, fields: dict[str, Any], stream: bool
) -> None:
    """Every way to request them is refused, naming field and policy, and the engine is not called."""
    write_late(tmp_path / "policies")
    front = await start(bindings=[{"policy": "late", "mode": "mandatory"}])
    assert is_refused(await ask(front, path, fields, stream), "late")
    assert engine.seen == []


@pytest.mark.parametrize(("path", "fields"), READS_NOT, ids=str)
async def test_readings_of_the_answer_are_allowed(
    start: Start, engine: FakeEngine, tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    """Log-probabilities of the answer, token ids and echoed text are allowed."""
    write_late(tmp_path / "policies")
    front = await start(bindings=[{"policy": "late", "mode": "mandatory"}])
    assert (await ask(front, path, fields))[0] == 200
    assert prompt_reading_field(ROUTES[path], fields) is None


@pytest.mark.parametrize(("path", "fields"), READS, ids=str)
async def test_prompt_readings_are_allowed_under_none_and_unconditional_policies(
    start: Start, engine: FakeEngine, path: str, fields: dict[str, Any]
) -> None:
    """`mechctl eval` needs this; the engine gets the caller's request unchanged."""
    front = await start("calm")
    for policy in ("none", "calm"):
        status, _ = await ask(front, path, fields, headers={"X-Steering-Policy": policy})
        assert status == 200
        assert engine.seen[-1].items() >= fields.items()


async def test_prompt_readings_are_refused_however_the_policy_is_bound(
    start: Start, engine: FakeEngine, tmp_path: Path
) -> None:
    """By header, by alias, as default and as part of a composition: the revision decides."""
    write_late(tmp_path / "policies")
    fields = {"prompt_logprobs": 1}
    front = await start("calm")
    assert is_refused(await ask(front, CHAT.path, fields, headers={"X-Steering-Policy": "late"}), "late")
    assert is_refused(await ask(front, CHAT.path, {**fields, "model": "tiny-model+late"}), "late")
    front = await start(bindings=[{"policy": "late", "mode": "default"}, {"policy": "*"}])
    assert is_refused(await ask(front, CHAT.path, fields), "late")
    assert (await ask(front, CHAT.path, fields, headers={"X-Steering-Policy": "calm"}))[0] == 200
    front = await start(bindings=[{"policy": name, "mode": "mandatory"} for name in ("calm", "late")])
    assert is_refused(await ask(front, CHAT.path, fields), "calm+late")
    assert (await ask(front, CHAT.path, {}))[0] == 200


async def test_shadow_gets_no_prompt_readings_either(start: Start, engine: FakeEngine, until: Until) -> None:
    """A shadow revision that would refuse the field is not run with it either."""
    front = await start("calm", **{"gateway.watch_policies": False, "policies.shadow_share": 1.0})
    write_late(front.policies, "calm", 1)
    path = front.policies / "calm.yaml"
    path.write_text(path.read_text() + "evaluation: {success_criteria: {collateral_damage_max: 0.05}}\n")
    async with front.admin.post("/admin/reload"):
        pass
    (listed,) = (await front.policy_list())["policies"]
    body = {"to": "shadow", "revision": listed["candidate"]}
    async with front.admin.post("/admin/policies/calm/promote", json=body) as answer:
        assert answer.status == 200
    model = {"model": "tiny-model+calm"}
    assert (await ask(front, CHAT.path, {**model, "prompt_logprobs": 1}))[0] == 200
    assert len(engine.seen) == 1
    assert (await ask(front, CHAT.path, model))[0] == 200

    async def repeated() -> bool:
        return len(engine.seen) == 3

    await until(repeated)
    assert [seen.get("prompt_logprobs") for seen in engine.seen] == [1, None, None]
