"""Every name in the settings must match something: a binding that never matches guards nobody."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine
from running_gateway import Front, PolicyWriter, Start

from interpretops.errors import ConfigError, EngineError
from interpretops.records.api_keys import ApiKey, make_key, rotate_key, write_keys

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, tuple[str, ApiKey]]:
    """A key file with two tenants' keys and a viewer's: stored keys by holder, and a function to rewrite
    it."""
    made = {
        "acme": make_key(tenant="acme"),
        "other": make_key(tenant="other"),
        "old": make_key(tenant="acme", expires=NOW - timedelta(days=1)),
        "viewer": make_key(role="viewer"),
    }
    write_keys(tmp_path / "keys.yaml", [kept for _, kept in made.values()])
    return made


@pytest.fixture
def guarded(
    start: Start, tmp_path: Path, keys: dict[str, tuple[str, ApiKey]]
) -> Callable[..., Awaitable[Front]]:
    """Start a gateway that requires keys."""
    tenants = [{"id": "acme"}, {"id": "other"}]

    async def run(**sections: Any) -> Front:
        return await start("calm", **{"tenants": tenants, "paths.keys": tmp_path / "keys.yaml", **sections})

    return run


def bound(policy: str = "calm", mode: str = "mandatory", **match: str) -> list[Any]:
    return [{"policy": policy, "mode": mode, "match": match}]


def metrics_of(front: Front) -> str:
    return front.apps.gateway.metrics.render().decode()


async def reasons(front: Front) -> list[str]:
    async with front.public.get("/readyz") as answer:
        return (await answer.json())["reasons"]


@pytest.mark.parametrize("mode", ["mandatory", "default", "optional"])
async def test_binding_on_an_unknown_key_prevents_start_up(
    guarded: Callable[..., Awaitable[Front]], keys: dict[str, tuple[str, ApiKey]], mode: str
) -> None:
    """A typo in `match.key` is reported with its location and the nearest key."""
    key = keys["acme"][1].id
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    got = rf"bindings\[0\]\.match\.key = '{wrong}', but .* no such key; did you mean '{key}'\?"
    with pytest.raises(ConfigError, match=got):
        await guarded(bindings=bound(mode=mode, key=wrong))


@pytest.mark.parametrize(
    ("holder", "match", "got"),
    [
        ("viewer", {}, "of role viewer, which opens the admin listener only"),
        ("other", {"tenant": "acme"}, "a key of tenant 'other', and match.tenant is 'acme'"),
    ],
)
async def test_binding_on_a_key_that_can_never_match_prevents_start_up(
    guarded: Callable[..., Awaitable[Front]],
    keys: dict[str, tuple[str, ApiKey]],
    holder: str,
    match: dict[str, str],
    got: str,
) -> None:
    """Keys of an admin or another tenant can never make a matching request."""
    with pytest.raises(ConfigError, match=got):
        await guarded(bindings=bound(key=keys[holder][1].id, **match))


@pytest.mark.parametrize(("mode", "expected"), [("mandatory", ["binding_unmatched"]), ("optional", [])])
async def test_expired_key_does_not_prevent_start_up(
    guarded: Callable[..., Awaitable[Front]],
    keys: dict[str, tuple[str, ApiKey]],
    mode: str,
    expected: list[str],
) -> None:
    """An expired key must not prevent a restart: it is counted, and not ready if its binding enforces."""
    front = await guarded(bindings=bound(mode=mode, key=keys["old"][1].id))
    assert await reasons(front) == expected
    assert 'interpretops_names_unmatched{place="bindings"} 1.0' in metrics_of(front)


async def test_gateway_is_not_ready_while_a_mandatory_binding_has_lost_its_key(
    guarded: Callable[..., Awaitable[Front]], keys: dict[str, tuple[str, ApiKey]], tmp_path: Path
) -> None:
    """Revoked while running: not ready, and counted. A new secret under the same id fixes it."""
    _, kept = keys["acme"]
    front = await guarded(bindings=bound(key=kept.id))
    assert await reasons(front) == []
    write_keys(tmp_path / "keys.yaml", [keys["other"][1]])
    front.apps.gateway.access.refresh()
    assert await reasons(front) == ["binding_unmatched"]
    metrics = metrics_of(front)
    assert 'interpretops_names_unmatched{place="bindings"} 1.0' in metrics
    assert 'interpretops_not_ready{reason="binding_unmatched"} 1.0' in metrics
    new, renewed = rotate_key(kept, None)
    write_keys(tmp_path / "keys.yaml", [renewed])
    front.apps.gateway.access.refresh()
    assert await reasons(front) == []
    status, headers, _ = await front.chat(headers={"Authorization": f"Bearer {new}"})
    assert (status, headers["X-Steering-Policy"].split("@")[0]) == (200, "calm")
    assert (await front.chat(headers={"Authorization": f"Bearer {keys['acme'][0]}"}))[0] == 401


async def test_optional_binding_that_lost_its_key_is_counted_only(
    guarded: Callable[..., Awaitable[Front]], keys: dict[str, tuple[str, ApiKey]], tmp_path: Path
) -> None:
    """Nobody relies on a choice that cannot be made."""
    front = await guarded(bindings=bound(mode="optional", key=keys["acme"][1].id))
    write_keys(tmp_path / "keys.yaml", [keys["other"][1]])
    front.apps.gateway.access.refresh()
    assert await reasons(front) == []
    assert 'interpretops_names_unmatched{place="bindings"} 1.0' in metrics_of(front)


@pytest.mark.parametrize(
    ("sections", "got"),
    [
        (
            {"bindings": bound(model_alias="medical-bt"), "aliases": [{"name": "medical-bot"}]},
            r"bindings\[0\]\.match\.model_alias = 'medical-bt', .* did you mean 'medical-bot'\?",
        ),
        (
            {"bindings": bound(model_alias="bot+calm"), "aliases": [{"name": "bot"}]},
            r"bindings\[0\]\.match\.model_alias = 'bot\+calm', .* did you mean 'bot'\?",
        ),
        (
            {"tenants": [{"id": "acme", "models": ["bt"]}], "aliases": [{"name": "bot"}]},
            r"tenants\[0\]\.models\[0\] = 'bt', .* did you mean 'bot'\?",
        ),
        (
            {"aliases": [{"name": "bot", "model": "tiny-m"}]},
            r"aliases\[0\]\.model = 'tiny-m', .* 'tiny-model'\?",
        ),
    ],
)
async def test_unknown_model_prevents_start_up_of_a_local_engine(
    start: Start, sections: dict[str, Any], got: str
) -> None:
    """The model name of a local engine is known before it starts."""
    own = {"engine.url": [], "model.name": "tiny-model"}
    with pytest.raises(ConfigError, match=got):
        await start(**own, **sections)


async def test_engine_without_the_bound_model_names_never_joins(start: Start, engine: FakeEngine) -> None:
    """A remote engine's names are known once it is proven: the binding is reported, and nobody is served."""
    front = await start(
        *("calm",),
        bindings=bound(model_alias="tiny-modle"),
        wait=False,
    )

    with pytest.raises(EngineError, match="did you mean 'tiny-model'"):
        await asyncio.wait_for(front.apps.engine_loop.task, 10)
    assert await reasons(front) == ["engine_not_ready"]
    assert (await front.chat())[0] == 503
    assert engine.seen == []


async def test_broken_alias_removes_no_other_model_from_the_list(start: Start, engine: FakeEngine) -> None:
    """Only the alias is missing and gives 404; it is logged and counted, and all else is served and
    listed."""
    front = await start("calm", aliases=[{"name": "broken", "model": "gone"}, {"name": "bot"}])
    async with front.public.get("/v1/models") as answer:
        listed = [model["id"] for model in (await answer.json())["data"]]
    assert (answer.status, listed) == (200, ["tiny-model", "tiny-model+calm", "bot", "bot+calm"])
    async with front.public.get("/v1/models/bot") as answer:
        assert answer.status == 200
    async with front.public.get("/v1/models/broken") as answer:
        assert answer.status == 404
    assert (await front.chat(model="broken"))[0] == 404
    assert (await front.chat(model="bot"))[0] == 200
    assert [line["why"] for line in front.log if line["event"] == "name_unmatched"] == [
        "aliases[0].model = 'gone', but no model or alias has that name; known are tiny-model"
    ]
    assert 'interpretops_names_unmatched{place="aliases"} 1.0' in metrics_of(front)


async def test_optional_binding_of_an_unknown_policy_is_reported(
    start: Start, policy_writer: PolicyWriter
) -> None:
    """An unknown policy is logged with the nearest id, and counted until its file exists."""
    front = await start("calm", bindings=bound("clam", "optional"))
    assert [line["why"] for line in front.log if line["event"] == "name_unmatched"] == [
        "bindings[0].policy = 'clam', but no policy has that id; did you mean 'calm'?"
    ]
    assert 'interpretops_names_unmatched{place="bindings"} 1.0' in metrics_of(front)
    policy_writer(front.policies, "clam")
    async with front.admin.post("/admin/reload") as answer:
        assert answer.status == 200
    assert 'interpretops_names_unmatched{place="bindings"} 0.0' in metrics_of(front)
