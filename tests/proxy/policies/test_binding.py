"""Which policy applies: what bindings require, what callers may choose, and no way around either."""

import json
from typing import Any

import pytest
from fake_engine import FakeEngine
from multidict import CIMultiDict, CIMultiDictProxy
from running_gateway import Start

from interpretops.errors import ConfigError
from interpretops.settings import Binding, Match
from proxy.errors import PolicyConflict, PolicyForbidden, UnknownModel, UnknownPolicy
from proxy.openai_api.headers import POLICY_HEADER
from proxy.policies.binding import Caller, decide, joint_mandatory, read_caller

CHAT = "/v1/chat/completions"
KNOWN = {"calm", "strict", "other"}
ANY = (Binding(policy="*"),)
MANDATORY = (*ANY, Binding(policy="strict", mode="mandatory"), Binding(policy="calm", mode="default"))


def caller(choice: str | None = None, **fields: str) -> Caller:
    return Caller(**{"route": CHAT, "model": "m", "choice": choice, **fields})


@pytest.mark.parametrize(
    ("bindings", "choice", "policy", "mode"),
    [
        (ANY, None, "none", "unbound"),
        (ANY, "none", "none", "optional"),
        (ANY, "calm", "calm", "optional"),
        ((), None, "none", "unbound"),
        ((Binding(policy="calm", mode="default"),), None, "calm", "default"),
        ((Binding(policy="calm", mode="default"),), "none", "none", "optional"),
        ((Binding(policy="calm", mode="default"), *ANY), "other", "other", "optional"),
        (
            (Binding(policy="calm", mode="default"), Binding(policy="other", mode="default")),
            None,
            "calm",
            "default",
        ),
        (MANDATORY, None, "strict", "mandatory"),
        (MANDATORY, "strict", "strict", "mandatory"),
        ((Binding(policy="none", mode="mandatory"),), None, "none", "mandatory"),
    ],
)
def test_decision(bindings: tuple[Any, ...], choice: str | None, policy: str, mode: str) -> None:
    """Mandatory comes before the caller's choice, and that before default; without bindings nothing
    applies."""
    decision = decide(bindings, caller(choice), KNOWN)
    assert (decision.policy, decision.mode) == (policy, mode)


@pytest.mark.parametrize("choice", ["none", "calm", "other", "unknown"])
def test_mandatory_policy_cannot_be_overridden_by_choice(choice: str) -> None:
    """A caller who asks for anything but the mandatory policy is refused."""
    with pytest.raises(PolicyForbidden) as refused:
        decide(MANDATORY, caller(choice), KNOWN)
    assert (refused.value.status, refused.value.retry) == (403, False)


@pytest.mark.parametrize(
    ("bindings", "choice"), [(ANY, "unknown"), ((Binding(policy="calm"),), "other"), ((), "calm")]
)
def test_policy_that_may_not_be_chosen_looks_unknown(bindings: tuple[Any, ...], choice: str) -> None:
    """A policy that does not exist and one that the caller may not choose get the same error."""
    with pytest.raises(UnknownPolicy):
        decide(bindings, caller(choice), KNOWN)


def test_binding_applies_only_where_it_matches() -> None:
    """Route, model and key must all match."""
    for field, value in (("model_alias", "m"), ("route", CHAT), ("tenant", "acme"), ("key", "k")):
        bound = (Binding(policy="strict", mode="mandatory", match=Match(**{field: value})), *ANY)
        same = caller(tenant="acme", key="k")
        assert decide(bound, same, KNOWN).policy == "strict"
        other = caller(**{{"model_alias": "model"}.get(field, field): "x"})
        assert decide(bound, other, KNOWN).policy == "none"


def headers(*pairs: tuple[str, str]) -> Any:
    return CIMultiDictProxy(CIMultiDict(pairs))


def test_header_and_alias_must_agree() -> None:
    """Naming the same policy twice is fine; two policies are a conflict."""
    assert read_caller(CHAT, headers((POLICY_HEADER, "calm")), "m+calm", {"m"}).choice == "calm"
    for given, model in (("none", "m+calm"), ("calm", "m+none"), ("calm", "m+other")):
        with pytest.raises(PolicyConflict):
            read_caller(CHAT, headers((POLICY_HEADER, given)), model, {"m"})
    with pytest.raises(PolicyConflict):
        read_caller(CHAT, headers((POLICY_HEADER, "calm"), ("x-steering-policy", "calm")), "m", {"m"})


@pytest.mark.parametrize(
    "value", ["", "calm,none", "calm none", "*", "../calm", "cälm", "calm@0123", "a" * 200]
)
def test_malformed_policy_header_is_refused(value: str) -> None:
    """Only a plain policy id is accepted."""
    with pytest.raises(UnknownPolicy):
        read_caller(CHAT, headers((POLICY_HEADER, value)), "m", {"m"})


@pytest.mark.parametrize("model", ["x", "m+", "m+a+b", "+calm", "M", "m ", "m+../x", "m+calm+"])
def test_model_that_is_not_served_is_unknown(model: str) -> None:
    """Model names match exactly, with at most one policy appended."""
    with pytest.raises(UnknownModel):
        read_caller(CHAT, headers(), model, {"m"})


def test_model_name_with_a_plus_is_served() -> None:
    """A model whose own name contains a plus can be used, with and without a policy."""
    assert read_caller(CHAT, headers(), "m+x", {"m+x"}).choice is None
    assert read_caller(CHAT, headers(), "m+x+calm", {"m+x"}).choice == "calm"


def mandatory(policy: str, **match: str) -> Binding:
    return Binding(policy=policy, mode="mandatory", match=Match(**match))


@pytest.mark.parametrize(
    ("one", "other", "joint"),
    [
        ({}, {}, True),
        ({"tenant": "x"}, {"route": CHAT}, True),
        ({"tenant": "x"}, {}, True),
        ({"tenant": "x"}, {"key": "k"}, True),
        ({"tenant": "x"}, {"tenant": "y"}, False),
        ({"tenant": "x", "route": CHAT}, {"tenant": "x", "route": "/v1/completions"}, False),
        ({"model_alias": "m"}, {"model_alias": "n"}, False),
    ],
)
def test_policies_are_mandatory_together_where_one_request_could_match_both(
    one: dict[str, str], other: dict[str, str], joint: bool
) -> None:
    """Bindings overlap if some request matches both; the same policy is always single."""
    assert joint_mandatory([mandatory("a", **one), mandatory("a", **other)]) == []
    found = joint_mandatory([mandatory("a", **one), mandatory("b", **other)])
    assert found == ([frozenset("ab")] if joint else [])
    both = caller(tenant="x", key="k")
    decided = decide([mandatory("a"), mandatory("b")], both, KNOWN)
    assert (decided.policy, decided.mode) == ("a+b", "mandatory")


def test_every_overlapping_set_is_known() -> None:
    """For three bindings that overlap in pairs and all together, every combination has its own plan."""
    three = [mandatory("a", tenant="x"), mandatory("b", route=CHAT), mandatory("c")]
    assert joint_mandatory(three) == [frozenset(s) for s in ("ab", "abc", "ac", "bc")]
    with pytest.raises(ConfigError, match="more than 8 sets of policies"):
        joint_mandatory([mandatory(name) for name in "abcdefgh"])


def test_mandatory_policy_and_mandatory_none_conflict() -> None:
    """A mandatory policy and a mandatory `none` for the same request prevent start-up; the error says
    where."""
    with pytest.raises(ConfigError, match=r"\[1\].policy = 'none', but bindings\[0\] makes 'a' mandatory"):
        joint_mandatory([mandatory("a"), mandatory("none", route=CHAT)])


async def test_mandatory_policy_that_cannot_be_loaded_refuses_everyone(
    start: Start, engine: FakeEngine
) -> None:
    """Without the required policy nobody is answered, and the gateway is not ready."""
    front = await start(bindings=[{"policy": "absent", "mode": "mandatory"}])
    status, _, body = await front.chat()
    assert (status, body["error"]["code"]) == (503, "policy_unavailable")
    async with front.public.get("/readyz") as answer:
        assert answer.status == 503
    assert engine.seen == []


async def test_model_list_offers_what_may_be_chosen(start: Start, engine: FakeEngine) -> None:
    """The model list holds the model and an alias for each policy that may be chosen, and no server paths."""
    front = await start("calm", "other")
    async with front.public.get("/v1/models") as answer:
        listed = await answer.json()
    assert [model["id"] for model in listed["data"]] == ["tiny-model", "tiny-model+calm", "tiny-model+other"]
    assert "/secret" not in json.dumps(listed)
    async with front.public.get("/v1/models/tiny-model+calm") as answer:
        assert (await answer.json())["parent"] == "tiny-model"
    async with front.public.get("/v1/models/nothing") as answer:
        assert answer.status == 404


async def test_dry_run_explains_without_running(start: Start, engine: FakeEngine) -> None:
    """`POST /admin/resolve` returns which policy would apply and why, and runs nothing."""
    front = await start("calm")
    async with front.admin.post("/admin/resolve", json={"model": "tiny-model", "policy": "calm"}) as answer:
        reported = await answer.json()
    assert (reported["policy"], reported["mode"]) == ("calm", "optional")
    assert reported["revision"] in engine.plans
    async with front.admin.post("/admin/resolve", json={"model": "tiny-model", "policy": "nope"}) as answer:
        assert (answer.status, (await answer.json())["error"]["code"]) == (400, "unknown_policy")
    assert engine.seen == []
