"""`mechctl keys` as an operator uses it."""

from datetime import UTC, datetime
from pathlib import Path

from typer.testing import CliRunner

from interpretops.errors import ConfigError
from interpretops.records.api_keys import KeyRing, make_key, read_keys, write_keys
from mechctl.main import app

RUNNER = CliRunner()


def run(*arguments: str) -> tuple[str, BaseException | None]:
    ended = RUNNER.invoke(app, ["keys", *arguments])
    return ended.stdout, ended.exception


def test_key_is_shown_once_and_works(tmp_path: Path) -> None:
    """`add` prints only the key on standard output; the file recognises it, and `list` shows no secret."""
    config = tmp_path / "config.yaml"
    config.write_text("tenants: [{id: acme}]\npaths: {keys: keys.yaml}\n")
    shown, failure = run("add", "--tenant", "acme", "--name", "CI", "--days", "30", "--config", str(config))
    assert failure is None
    key = shown.strip()
    (kept,) = read_keys(tmp_path / "keys.yaml")
    assert KeyRing((kept,)).find(key) == kept
    assert (kept.tenant, kept.name) == ("acme", "CI")
    assert kept.expires is not None
    listed, _ = run("list", "--config", str(config))
    assert listed.startswith(f"{kept.id}  tenant acme")
    assert key.split("_", 2)[2] not in listed


def test_revoked_key_is_removed_and_others_stay(tmp_path: Path) -> None:
    """`revoke` removes one key; an unknown id is an error."""
    file = str(tmp_path / "keys.yaml")
    run("add", "--tenant", "acme", "--file", file)
    run("add", "--role", "operator", "--file", file)
    first, second = read_keys(Path(file))
    assert run("revoke", first.id, "--file", file)[1] is None
    assert read_keys(Path(file)) == (second,)
    failure = run("revoke", first.id, "--file", file)[1]
    assert isinstance(failure, ConfigError)
    assert f"holds no key {first.id!r}" in str(failure)


def test_invalid_keys_are_refused_with_the_remedy(tmp_path: Path) -> None:
    """No key is made without a holder, for two uses, for an unknown role or tenant, or without a file."""
    config = tmp_path / "config.yaml"
    config.write_text("tenants: [{id: acme}]\n")
    file = ("--file", str(tmp_path / "keys.yaml"))
    for arguments, told in (
        ((*file,), "either --tenant ID or --role"),
        ((*file, "--tenant", "a", "--role", "viewer"), "either --tenant ID or --role"),
        ((*file, "--role", "root"), "must be viewer or operator"),
        ((*file, "--tenant", "acne", "--config", str(config)), "the settings declare acme"),
        (("--tenant", "acme", "--config", str(config)), "paths.keys is not set"),
    ):
        failure = run("add", *arguments)[1]
        assert isinstance(failure, ConfigError)
        assert told in str(failure)
    assert not (tmp_path / "keys.yaml").exists()


def test_rotated_key_keeps_its_id_and_only_the_new_secret_works(tmp_path: Path) -> None:
    """`rotate` shows the new secret once; id, tenant and name stay, other keys do not change."""
    file = str(tmp_path / "keys.yaml")
    old, _ = run("add", "--tenant", "acme", "--name", "CI", "--file", file)
    run("add", "--role", "operator", "--file", file)
    before = read_keys(Path(file))
    new, failure = run("rotate", before[0].id, "--file", file)
    assert failure is None
    after = read_keys(Path(file))
    ring = KeyRing(after)
    assert ring.find(old.strip()) is None
    assert ring.find(new.strip()) == after[0]
    kept = ("id", "tenant", "role", "name", "expires")
    assert [getattr(after[0], name) for name in kept] == [getattr(before[0], name) for name in kept]
    assert after[1] == before[1]


def test_expired_key_is_rotated_only_with_days(tmp_path: Path) -> None:
    """Rotating an expired key without --days is refused; so is an unknown id."""
    path = tmp_path / "keys.yaml"
    _, expired = make_key(tenant="acme", expires=datetime(2020, 1, 1, tzinfo=UTC))
    write_keys(path, [expired])
    failure = run("rotate", expired.id, "--file", str(path))[1]
    assert isinstance(failure, ConfigError)
    assert "give --days" in str(failure)
    new, failure = run("rotate", expired.id, "--days", "1", "--file", str(path))
    assert failure is None
    assert KeyRing(read_keys(path)).find(new.strip()) is not None
    assert "holds no key" in str(run("rotate", "0" * 12, "--file", str(path))[1])
