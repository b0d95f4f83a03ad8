"""Authentication: keys, tenants and roles, on both listeners."""

import asyncio
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from certificates import write_certificate
from fake_engine import FakeEngine
from running_gateway import Front, Start, Until

from interpretops.errors import ConfigError
from interpretops.records.api_keys import KeyRing, make_key, read_keys, write_keys
from proxy.http.tls import TlsListener
from proxy.openai_api.routes import ROUTES, UNGUARDED
from proxy.process.file_reader import Reader
from proxy.tenants.access import check_exposure, names_this_machine

TENANTS = [{"id": "acme", "models": ["tiny-model", "bot"]}, {"id": "other", "routes": ["/v1/completions"]}]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """A key file, and its keys by holder."""
    made = {
        "acme": make_key(tenant="acme"),
        "other": make_key(tenant="other"),
        "old": make_key(tenant="acme", expires=datetime(2020, 1, 1, tzinfo=UTC)),
        "viewer": make_key(role="viewer", name="vera"),
        "operator": make_key(role="operator", name="otto"),
    }
    write_keys(tmp_path / "keys.yaml", [kept for _, kept in made.values()])
    return {holder: key for holder, (key, _) in made.items()}


@pytest.fixture
def guarded(start: Start, tmp_path: Path, keys: dict[str, str]) -> Callable[..., Awaitable[Front]]:
    """Start a gateway that requires keys."""

    async def run(*policies: str, **sections: Any) -> Front:
        declared = {"tenants": TENANTS, "paths.keys": tmp_path / "keys.yaml", **sections}
        return await start(*policies, **declared)

    return run


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def test_only_tenant_keys_are_accepted_at_the_endpoint(
    guarded: Callable[..., Awaitable[Front]], engine: FakeEngine, keys: dict[str, str]
) -> None:
    """Without a tenant's key nobody gets an answer, a model list, or a list of routes."""
    front = await guarded("calm")
    flipped = keys["acme"][:-1] + ("A" if keys["acme"][-1] != "A" else "B")
    wrong = [
        {},
        bearer(flipped),
        bearer(""),
        bearer(keys["old"]),
        bearer(keys["operator"]),
        bearer("iops_" + "0" * 12 + "_" + "A" * 43),
        {"Authorization": f"Basic {keys['acme']}"},
        {**bearer(keys["acme"]), "x-api-key": keys["other"]},
    ]
    for headers in wrong:
        status, given, body = await front.chat(headers=headers)
        assert (status, body["error"]["code"]) == (401, "invalid_api_key")
        assert body["error"]["type"] == "authentication_error"
        assert (given["WWW-Authenticate"], given["x-should-retry"]) == ("Bearer", "false")
        for path in ("/v1/models", "/nothing"):
            async with front.public.get(path, headers=headers) as answer:
                assert answer.status == 401
    assert engine.seen == []
    for headers in (bearer(keys["acme"]), {"x-api-key": keys["acme"]}):
        assert (await front.chat(headers=headers))[0] == 200


async def test_orchestrator_needs_no_key(guarded: Callable[..., Awaitable[Front]]) -> None:
    """Liveness and readiness answer without a key."""
    front = await guarded()
    for session in (front.public, front.admin):
        for path in ("/healthz", "/readyz"):
            async with session.get(path) as answer:
                assert answer.status == 200


async def test_tenant_sees_and_uses_only_its_models_and_routes(
    guarded: Callable[..., Awaitable[Front]], engine: FakeEngine, keys: dict[str, str]
) -> None:
    """Models and routes of other tenants are refused and not listed."""
    front = await guarded("calm", aliases=[{"name": "bot"}, {"name": "secret-bot"}])
    async with front.public.get("/v1/models", headers=bearer(keys["acme"])) as answer:
        listed = [model["id"] for model in (await answer.json())["data"]]
    assert listed == ["tiny-model", "tiny-model+calm", "bot", "bot+calm"]
    assert (await front.chat(headers=bearer(keys["acme"]), model="bot+calm"))[0] == 200
    assert engine.seen[-1]["model"] == "tiny-model"
    for model in ("secret-bot", "secret-bot+calm", "Bot", "b\u043et"):
        status, _, body = await front.chat(headers=bearer(keys["acme"]), model=model)
        assert (status, body["error"]["code"]) == (404, "model_not_found")
    status, _, body = await front.chat(headers=bearer(keys["other"]))
    assert (status, body["error"]["code"]) == (403, "not_permitted")
    assert len(engine.seen) == 1


async def test_binding_holds_for_its_tenant_and_key(
    guarded: Callable[..., Awaitable[Front]], engine: FakeEngine, keys: dict[str, str]
) -> None:
    """A policy mandatory for one tenant applies to all its keys and to nobody else."""
    key_id = keys["other"].split("_")[1]
    bindings = [
        {"policy": "calm", "mode": "mandatory", "match": {"tenant": "acme"}},
        {"policy": "strict", "mode": "default", "match": {"key": key_id}},
        {"policy": "*"},
    ]
    tenants = [{"id": "acme"}, {"id": "other"}]
    front = await guarded("calm", "strict", bindings=bindings, tenants=tenants)
    labels = {}
    for holder in ("acme", "other"):
        _, headers, _ = await front.chat(headers=bearer(keys[holder]))
        labels[holder] = headers["X-Steering-Policy"].split("@")[0]
    assert labels == {"acme": "calm", "other": "strict"}
    status, _, _ = await front.chat(headers=bearer(keys["acme"]), model="tiny-model+strict")
    assert status == 403


async def test_dry_run_explains_every_binding(
    guarded: Callable[..., Awaitable[Front]], engine: FakeEngine, keys: dict[str, str]
) -> None:
    """An operator sees which bindings matched a tenant or key, and which decided, without its secret."""
    bindings = [{"policy": "calm", "mode": "mandatory", "match": {"tenant": "acme"}}, {"policy": "*"}]
    front = await guarded("calm", bindings=bindings)
    headers = bearer(keys["viewer"])

    async def resolve(**body: str) -> tuple[Any, ...]:
        async with front.admin.post("/admin/resolve", json=body, headers=headers) as answer:
            return answer.status, await answer.json()

    status, got = await resolve(key=keys["acme"].split("_")[1])
    assert (status, got["policy"], got["mode"], got["tenant"]) == (
        200,
        "calm",
        "mandatory",
        "acme",
    )
    assert [binding["matches"] for binding in got["bindings"]] == [True, True]
    _, got = await resolve(tenant="other", route="/v1/completions")
    assert (got["policy"], [binding["matches"] for binding in got["bindings"]]) == (
        "none",
        [False, True],
    )
    assert (await resolve(tenant="nobody"))[0] == 400
    assert (await resolve(tenant="other"))[1]["error"]["code"] == "not_permitted"
    assert engine.seen == []


async def test_roles_on_the_admin_listener(
    guarded: Callable[..., Awaitable[Front]], keys: dict[str, str]
) -> None:
    """A viewer may read, an operator may change, a tenant's key may do neither."""
    front = await guarded("calm")

    async def status(method: str, path: str, holder: str) -> int:
        headers = bearer(keys[holder]) if holder else {}
        async with front.admin.request(method, path, headers=headers) as answer:
            return answer.status

    assert [await status("GET", "/metrics", who) for who in ("", "acme", "viewer", "operator")] == [
        *(401, 401, 200, 200)
    ]
    assert [await status("POST", "/admin/reload", who) for who in ("", "acme", "viewer", "operator")] == [
        *(401, 401, 403, 200)
    ]


async def test_keys_can_be_added_and_revoked_while_running(
    guarded: Callable[..., Awaitable[Front]],
    engine: FakeEngine,
    keys: dict[str, str],
    tmp_path: Path,
    until: Until,
) -> None:
    """New keys work and revoked ones do not, without a restart; a broken file only changes a metric."""
    front = await guarded()
    path = tmp_path / "keys.yaml"
    new, kept = make_key(tenant="acme")
    write_keys(path, [kept])

    async def works(key: str) -> bool:
        return (await front.chat(headers=bearer(key)))[0] == 200

    await until(lambda: works(new))
    assert not await works(keys["acme"])
    path.write_text("keys: [")
    await asyncio.to_thread(front.apps.gateway.access.refresh)
    assert await works(new)
    assert b"interpretops_keys_broken 1.0" in front.apps.gateway.metrics.render()


async def test_deleting_the_key_file_revokes_all_keys(
    guarded: Callable[..., Awaitable[Front]],
    engine: FakeEngine,
    keys: dict[str, str],
    tmp_path: Path,
    until: Until,
) -> None:
    """A deleted file holds no keys: all requests are refused, and readiness and log say why. It is not
    treated as if no keys were required. Restored, the keys work again."""
    front = await guarded()
    path, holder = tmp_path / "keys.yaml", bearer(keys["acme"])
    assert (await front.chat(headers=holder))[0] == 200
    path.rename(tmp_path / "aside.yaml")

    async def revoked() -> bool:
        return (await front.chat(headers=holder))[0] == 401

    await until(revoked)
    assert (await front.chat())[0] == 401
    async with front.admin.get("/admin/policies", headers=bearer(keys["operator"])) as answer:
        assert answer.status == 401
    async with front.public.get("/readyz") as answer:
        assert (answer.status, (await answer.json())["reasons"]) == (503, ["keys_unusable"])
    assert any("was deleted: all keys are revoked" in str(line.get("error")) for line in front.log)
    assert b"interpretops_keys_broken 1.0" in front.apps.gateway.metrics.render()
    (tmp_path / "aside.yaml").rename(path)
    await until(front.engine_ready)
    assert (await front.chat(headers=holder))[0] == 200


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_text("keys: ["),
        lambda path: path.write_text(""),
        lambda path: path.write_bytes(b"#" * 2**21),
        pipe,
        loop,
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
async def test_broken_key_file_has_a_bounded_grace(
    guarded: Callable[..., Awaitable[Front]],
    engine: FakeEngine,
    keys: dict[str, str],
    tmp_path: Path,
    until: Until,
    spoil: Callable[..., Any],
) -> None:
    """While the file cannot be read, old keys stay in force for a set time, and a reload reports it. Then all
    requests get 503 and readiness fails, until the file is valid again."""
    front = await guarded(**{"gateway.keys_grace_s": 120.0})
    access, path, holder = front.apps.gateway.access, tmp_path / "keys.yaml", bearer(keys["acme"])
    whole = path.read_bytes()
    spoil(path)
    async with front.admin.post("/admin/reload", headers=bearer(keys["operator"])) as answer:
        report = await answer.json()
    assert report["ok"] is False
    assert report["failed"].keys() == {str(path)}
    assert (await front.chat(headers=holder))[0] == 200
    assert await front.engine_ready()
    real = access._clock
    access._clock = lambda: real() + 130.0
    status, headers, body = await front.chat(headers=holder)
    assert (status, body["error"]["code"], headers["x-should-retry"]) == (503, "keys_unavailable", "true")
    async with front.public.get("/readyz") as answer:
        assert (answer.status, (await answer.json())["reasons"]) == (503, ["keys_unusable"])
    (tmp_path / "fresh").write_bytes(whole)
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    (tmp_path / "fresh").rename(path)
    await until(front.engine_ready)
    assert (await front.chat(headers=holder))[0] == 200


async def test_keys_expire_when_the_file_system_hangs(
    guarded: Callable[..., Awaitable[Front]],
    engine: FakeEngine,
    keys: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file system that hangs counts as an unreadable file: the grace period runs, although no error
    occurs."""
    front = await guarded()
    access, holder, held = front.apps.gateway.access, bearer(keys["acme"]), threading.Event()
    monkeypatch.setattr(access, "_reader", Reader("the keys", 0.05))
    monkeypatch.setattr(access, "refresh", lambda: held.wait(30))
    await access.refresh_off_loop()
    assert "the keys: could not be read within 0.05 s" in access.failure
    assert (await front.chat(headers=holder))[0] == 200
    real = access._clock
    access._clock = lambda: real() + 310.0
    assert (await front.chat(headers=holder))[0] == 503
    held.set()


async def test_keys_never_reach_log_or_metrics(
    guarded: Callable[..., Awaitable[Front]], keys: dict[str, str]
) -> None:
    """Key ids are logged, secrets never, right or wrong."""
    front = await guarded()
    await front.chat(headers=bearer(keys["acme"]))
    await front.chat(headers=bearer(keys["acme"] + "x"))
    got = str(front.log) + front.apps.gateway.metrics.render().decode()
    _, key_id, secret = keys["acme"].split("_", 2)
    assert key_id in got
    assert secret not in got
    requests = [line for line in front.log if line["event"] == "request"]
    assert [line["tenant"] for line in requests] == ["acme", "none"]


def test_key_file_holds_no_key_and_is_private(tmp_path: Path) -> None:
    """Two keys of one tenant share nothing in the file, and only its owner can read it."""
    path = tmp_path / "keys.yaml"
    (key, kept), (_, second) = make_key(tenant="a"), make_key(tenant="a")
    write_keys(path, [kept, second])
    assert key.split("_", 2)[2] not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_keys(path) == (kept, second)
    assert kept.salt != second.salt
    assert KeyRing(read_keys(path)).find(key) == kept
    later = datetime.now(UTC) + timedelta(days=2)
    expiring, kept = make_key(tenant="a", expires=datetime.now(UTC) + timedelta(days=1))
    assert KeyRing((kept,)).find(expiring) == kept
    assert KeyRing((kept,)).find(expiring, later) is None


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ("keys: [{id: x}]", "keys[0].id"),
        ("unknown: 1", "unknown"),
        ("keys: [", "YAML"),
    ],
)
def test_invalid_key_file_is_reported(tmp_path: Path, content: str, got: str) -> None:
    """An invalid file prevents start-up; the error names file and field."""
    path = tmp_path / "keys.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError) as refused:
        read_keys(path)
    assert str(path) in str(refused.value)
    assert got in str(refused.value)


async def test_missing_key_file_prevents_start_up(start: Start, tmp_path: Path) -> None:
    """The error names the file, and how to create it."""
    with pytest.raises(ConfigError, match=r"no such file; create a key with `mechctl keys add`"):
        await start(**{"paths.keys": tmp_path / "keys.yaml"})


async def test_key_of_an_undeclared_tenant_is_skipped(
    guarded: Callable[..., Awaitable[Front]], keys: dict[str, str], tmp_path: Path
) -> None:
    """It is skipped, at start-up and later; other keys work as usual, and reload reports it."""
    path = tmp_path / "keys.yaml"
    ghost, kept = make_key(tenant="ghost")
    write_keys(path, (*read_keys(path), kept))
    front = await guarded("calm", **{"gateway.watch_policies": False})

    async def reload() -> dict[str, Any]:
        async with front.admin.post("/admin/reload", headers=bearer(keys["operator"])) as answer:
            return await answer.json()

    assert (await front.chat(headers=bearer(ghost)))[0] == 401
    assert (await front.chat(headers=bearer(keys["acme"])))[0] == 200
    assert await front.engine_ready()
    got = (await reload())["keys"]
    assert (got["loaded"], [*got["skipped"]], got["failed"]) == (5, [kept.id], None)
    assert "is for tenant 'ghost', but tenants declares acme, other;" in got["skipped"][kept.id]
    assert "interpretops_keys_skipped 1.0" in front.apps.gateway.metrics.render().decode()
    revoked = keys["acme"].split("_")[1]
    write_keys(path, [key for key in read_keys(path) if key.id != revoked])
    assert (await reload())["keys"]["loaded"] == 4
    assert (await front.chat(headers=bearer(keys["acme"])))[0] == 401
    assert len([line for line in front.log if line["event"] == "key_skipped"]) == 1
    write_keys(path, [key for key in read_keys(path) if key.id != kept.id])
    assert (await reload())["keys"]["skipped"] == {}
    assert "interpretops_keys_skipped 0.0" in front.apps.gateway.metrics.render().decode()


async def test_reload_fails_when_the_keys_do(
    guarded: Callable[..., Awaitable[Front]], keys: dict[str, str], tmp_path: Path
) -> None:
    """If the key file is rejected, the response says not ok, with file and error."""
    front = await guarded("calm", **{"gateway.watch_policies": False})
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [{id: x}]")
    async with front.admin.post("/admin/reload", headers=bearer(keys["operator"])) as answer:
        got = await answer.json()
    assert not got["ok"]
    assert "keys[0].id" in got["failed"][str(path)]
    assert got["keys"]["failed"] == got["failed"][str(path)]


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.0.2.1", "2001:db8::1"])  # noqa: S104
def test_gateway_without_keys_stays_on_this_machine(address: str) -> None:
    """Without keys only loopback addresses may be used."""
    with pytest.raises(ConfigError, match=r"gateway.host = .* set paths.keys, or listen on 127.0.0.1"):
        check_exposure(address, "gateway.host", keys=False)
    check_exposure(address, "gateway.host", keys=True)
    for loopback in ("127.0.0.1", "127.1.2.3", "::1"):
        check_exposure(loopback, "gateway.host", keys=False)


@pytest.mark.parametrize(("flag", "field"), [("--host", "gateway.host")])
def test_serve_refuses_to_listen_beyond_this_machine_without_keys(
    tmp_path: Path, flag: str, field: str
) -> None:
    """`mechctl serve` exits with one line before anything slow."""
    command = [sys.executable, "-m", "mechctl.main", "serve", "--port", "0", "--admin-port", "0"]
    ended = subprocess.run([*command, flag, "0.0.0.0"], capture_output=True, text=True, timeout=60)  # noqa: S104
    assert ended.returncode == 2
    assert (
        ended.stderr.strip()
        .splitlines()[-1]
        .startswith(f"{field} = '0.0.0.0', but other machines can reach that address")
    )


async def test_foreign_page_cannot_read_the_admin_routes(start: Start) -> None:
    """A DNS name that points to this machine does not open the keyless admin listener."""
    front = await start()
    for host, status in (("evil.example:8001", 400), ("localhost:8001", 200), ("[::1]:8001", 200)):
        async with front.admin.get("/admin/policies", headers={"Host": host}) as answer:
            assert answer.status == status
    assert not names_this_machine("127.0.0.1.evil.example")
    assert not names_this_machine(None)


READ = ["/healthz", "/readyz", "/openapi.json", "/v1/models", "/v1/models/tiny-model", "/none"]


@pytest.mark.parametrize(
    ("headers", "served"),
    [
        ({"Host": "evil.example"}, False),
        ({"Host": "evil.example:8000"}, False),
        ({"Host": "127.0.0.1.evil.example"}, False),
        ({"Host": "10.1.2.3:8000"}, False),
        ({"Host": ""}, False),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://evil.example", "Host": "localhost"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "chrome-extension://localhost"}, False),
        ({"Origin": "http://localhost.evil.example"}, False),
        ({}, True),
        ({"Host": "localhost:8000"}, True),
        ({"Host": "LOCALHOST"}, True),
        ({"Host": "[::1]:8000", "Origin": "http://localhost:3000"}, True),
        ({"Host": "chat.corp.example", "Origin": "https://chat.corp.example"}, True),
    ],
)
async def test_foreign_page_reaches_no_route_without_keys(
    start: Start, engine: FakeEngine, headers: dict[str, str], served: bool
) -> None:
    """A page whose name points to this machine can neither read the endpoint nor run anything."""
    front = await start(**{"gateway.allowed_hosts": ["chat.corp.example"]})
    for path in (*READ, *ROUTES, *UNGUARDED):
        method = "GET" if path in READ else "POST"
        for asked in (method, "OPTIONS"):
            async with front.public.request(asked, path, json={}, headers=headers) as answer:
                refused = answer.status == 403 and (await answer.json())["error"]["code"] == "foreign_page"
                assert refused != served, (asked, path)
    assert (engine.seen, engine.plain) == ([], [])


async def test_with_keys_any_host_name_is_accepted(
    guarded: Callable[..., Awaitable[Front]], keys: dict[str, str]
) -> None:
    """A request with a key is not from a foreign page; any host name is allowed then."""
    front = await guarded("calm")
    headers = {"Host": "api.example", "Origin": "https://app.example"}
    assert (await front.chat(headers={**headers, **bearer(keys["acme"])}))[0] == 200


async def test_listener_with_a_certificate_speaks_tls_only(tmp_path: Path) -> None:
    """A client that trusts the certificate is answered; plain HTTP is not."""
    cert, key = write_certificate(tmp_path)
    context = TlsListener("public", cert, key, "gateway.tls_cert").context
    app = web.Application()
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context).start()
    port = runner.addresses[0][1]
    trusting = ssl.create_default_context(cafile=cert)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    async with aiohttp.ClientSession() as session:
        async with session.get(f"https://127.0.0.1:{port}/", ssl=trusting) as answer:
            assert answer.status == 404
        with pytest.raises(aiohttp.ClientError):
            await session.get(f"http://127.0.0.1:{port}/")
    await runner.cleanup()
    with pytest.raises(ConfigError, match=r"gateway.tls_cert = .* cannot be used with"):
        TlsListener("public", cert, cert, "gateway.tls_cert")
    with pytest.raises(ConfigError, match=r"No such file"):
        TlsListener("public", tmp_path / "none.pem", key, "gateway.tls_cert")
