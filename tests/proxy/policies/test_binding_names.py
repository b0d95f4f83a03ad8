"""Every name in the settings stands for something: a binding that can match nobody guards nobody."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from interpretops.errors import ConfigError, EngineError
from interpretops.records.api_keys import make_key, rotate_key, write_keys

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def keys(tmp_path):
    """A file of two tenants' keys and a viewer's, as they are kept, by holder; and how it is written anew."""
    made = {
        "acme": make_key(tenant="acme"),
        "other": make_key(tenant="other"),
        "old": make_key(tenant="acme", expires=NOW - timedelta(days=1)),
        "viewer": make_key(role="viewer"),
    }
    write_keys(tmp_path / "keys.yaml", [kept for _, kept in made.values()])
    return made


@pytest.fixture
def guarded(start, tmp_path, keys):
    """Starts a gateway that asks for keys."""
    tenants = [{"id": "acme"}, {"id": "other"}]

    async def run(**sections):
        return await start("calm", **{"tenants": tenants, "paths.keys": tmp_path / "keys.yaml", **sections})

    return run


def bound(policy="calm", mode="mandatory", **match):
    return [{"policy": policy, "mode": mode, "match": match}]


def metrics_of(front):
    return front.apps.gateway.metrics.render().decode()


async def reasons(front):
    async with front.public.get("/readyz") as answer:
        return (await answer.json())["reasons"]


@pytest.mark.parametrize("mode", ["mandatory", "default", "optional"])
async def test_binding_by_an_unknown_key_stops_the_start(guarded, keys, mode):
    """A typing error in `match.key` is named with its place and the nearest key."""
    key = keys["acme"][1].id
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")
    told = rf"bindings\[0\]\.match\.key = '{wrong}', but .* no such key; did you mean '{key}'\?"
    with pytest.raises(ConfigError, match=told):
        await guarded(bindings=bound(mode=mode, key=wrong))


@pytest.mark.parametrize(
    ("holder", "match", "told"),
    [
        ("viewer", {}, "of role viewer, which opens the admin listener only"),
        ("other", {"tenant": "acme"}, "a key of tenant 'other', and match.tenant is 'acme'"),
    ],
)
async def test_binding_by_a_key_that_cannot_ask_stops_the_start(guarded, keys, holder, match, told):
    """An admin's key, another tenant's: none of them ever makes a request that matches."""
    with pytest.raises(ConfigError, match=told):
        await guarded(bindings=bound(key=keys[holder][1].id, **match))


@pytest.mark.parametrize(("mode", "expected"), [("mandatory", ["binding_unmatched"]), ("optional", [])])
async def test_key_that_has_expired_does_not_keep_the_gateway_down(guarded, keys, mode, expected):
    """What was right once must not stop a restart: it is counted, and not ready where it enforces."""
    front = await guarded(bindings=bound(mode=mode, key=keys["old"][1].id))
    assert await reasons(front) == expected
    assert 'interpretops_names_unmatched{place="bindings"} 1.0' in metrics_of(front)


async def test_gateway_is_not_ready_while_a_mandatory_binding_has_lost_its_key(guarded, keys, tmp_path):
    """Revoked while it runs: not ready, and counted. A new secret under the same id mends it."""
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


async def test_optional_binding_that_lost_its_key_is_counted_only(guarded, keys, tmp_path):
    """Nobody relies on a choice that nobody can make."""
    front = await guarded(bindings=bound(mode="optional", key=keys["acme"][1].id))
    write_keys(tmp_path / "keys.yaml", [keys["other"][1]])
    front.apps.gateway.access.refresh()
    assert await reasons(front) == []
    assert 'interpretops_names_unmatched{place="bindings"} 1.0' in metrics_of(front)


@pytest.mark.parametrize(
    ("sections", "told"),
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
async def test_model_that_nobody_serves_stops_the_start_of_an_own_engine(start, sections, told):
    """The name of an engine that is started here is known before it starts."""
    own = {"engine.url": [], "model.name": "tiny-model"}
    with pytest.raises(ConfigError, match=told):
        await start(**own, **sections)


async def test_engine_under_names_that_bindings_do_not_know_never_joins(start, engine):
    """An engine elsewhere tells its names when it is proven: the binding is named, and nobody is served."""
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


async def test_broken_alias_takes_no_other_model_from_the_list(start, engine):
    """The alias alone is missing and 404; it is logged and counted, and all else is served and listed."""
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


async def test_optional_binding_of_an_unknown_policy_is_told(start, policy_writer):
    """A choice that does not exist is logged with the nearest id, and counted until its file is there."""
    front = await start("calm", bindings=bound("clam", "optional"))
    assert [line["why"] for line in front.log if line["event"] == "name_unmatched"] == [
        "bindings[0].policy = 'clam', but no policy has that id; did you mean 'calm'?"
    ]
    assert 'interpretops_names_unmatched{place="bindings"} 1.0' in metrics_of(front)
    policy_writer(front.policies, "clam")
    async with front.admin.post("/admin/reload") as answer:
        assert answer.status == 200
    assert 'interpretops_names_unmatched{place="bindings"} 0.0' in metrics_of(front)
