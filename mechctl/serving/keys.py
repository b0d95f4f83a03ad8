"""`mechctl keys`: makes, lists and revokes API keys; a key is shown once and stored as a hash."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer

from mechctl.options.shared_options import Config

keys_app = typer.Typer(name="keys", help="Make, list and revoke API keys.", no_args_is_help=True)

File = Annotated[
    Path | None,
    typer.Option("--file", help="Key file; default: `paths.keys` of the settings.", show_default=False),
]


@keys_app.command()
def add(
    tenant: Annotated[str | None, typer.Option("--tenant", help="Tenant that the key authenticates.")] = None,
    role: Annotated[
        str | None, typer.Option("--role", help="For the admin listener: `viewer` or `operator`.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the key's holder.", show_default=False)] = "",
    days: Annotated[
        int | None, typer.Option("--days", min=1, help="Days until it expires; default: never.")
    ] = None,
    file: File = None,
    config: Config = None,
) -> None:
    """Make a key and show it once. A running gateway accepts it within seconds."""
    from interpretops.errors import ConfigError
    from interpretops.records.api_keys import make_key, read_keys, write_keys

    path, tenants = _file(file, config)
    if (tenant is None) == (role is None):
        raise ConfigError("a key needs either --tenant ID or --role viewer|operator")
    if role is not None and role not in ("viewer", "operator"):
        raise ConfigError(f"--role = {role!r}, but must be viewer or operator")
    if tenant is not None and tenants is not None and tenant not in tenants:
        known = ", ".join(tenants) or "none"
        raise ConfigError(f"--tenant = {tenant!r}, but the settings declare {known}; add it to `tenants`")
    expires = None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)
    key, kept = make_key(tenant=tenant, role=role, name=name, expires=expires)  # type: ignore[arg-type]  # checked above
    before = read_keys(path) if path.exists() else None
    write_keys(path, (*(before or ()), kept))
    if before is None:
        _note_reader(path)
    typer.echo(f"key {kept.id} is in {path}; it is shown only here:", err=True)
    typer.echo(key)


@keys_app.command("list")
def list_keys(file: File = None, config: Config = None) -> None:
    """List the keys and whom they belong to."""
    from interpretops.records.api_keys import read_keys

    path, _ = _file(file, config)
    for key in read_keys(path):
        until = "" if key.expires is None else f"  until {key.expires.isoformat()}"
        use = f"tenant {key.tenant}" if key.tenant is not None else f"role {key.role}"
        typer.echo(f"{key.id}  {use}  since {key.created.isoformat()}{until}  {key.name}".rstrip())


@keys_app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `mechctl keys list` shows it.")],
    file: File = None,
    config: Config = None,
) -> None:
    """Revoke a key. A running gateway refuses it within seconds."""
    from interpretops.errors import ConfigError
    from interpretops.records.api_keys import read_keys, write_keys

    path, _ = _file(file, config)
    keys = read_keys(path)
    left = [key for key in keys if key.id != key_id]
    if len(left) == len(keys):
        raise ConfigError(f"{path}: holds no key {key_id!r}; `mechctl keys list` shows what it holds")
    write_keys(path, left)
    typer.echo(f"key {key_id} is revoked")


@keys_app.command()
def rotate(
    key_id: Annotated[str, typer.Argument(help="The key's id, as `mechctl keys list` shows it.")],
    days: Annotated[
        int | None, typer.Option("--days", min=1, help="Days until it expires; default: unchanged.")
    ] = None,
    file: File = None,
    config: Config = None,
) -> None:
    """Give a key a new secret and show it once. Its id stays, so bindings that name it still apply.

    A running gateway accepts the new secret and refuses the old one within seconds. To let both work for a
    while, add a second key, name both in bindings by key, and revoke the first later.
    """
    from interpretops.errors import ConfigError
    from interpretops.records.api_keys import read_keys, rotate_key, write_keys

    path, _ = _file(file, config)
    keys = read_keys(path)
    old = next((key for key in keys if key.id == key_id), None)
    if old is None:
        raise ConfigError(f"{path}: holds no key {key_id!r}; `mechctl keys list` shows what it holds")
    now = datetime.now(UTC).replace(microsecond=0)
    expires = old.expires if days is None else now + timedelta(days=days)
    if expires is not None and expires <= now:
        raise ConfigError(f"{path}: key {key_id} expired on {expires.isoformat()}; give --days to renew it")
    key, kept = rotate_key(old, expires)
    write_keys(path, [kept if other is old else other for other in keys])
    typer.echo(f"key {key_id} has a new secret in {path}; it is shown only here:", err=True)
    typer.echo(key)


def _note_reader(path: Path) -> None:
    """Warn if the folder's owner, possibly the gateway's user, cannot read the new key file."""
    import os

    from interpretops.files.atomic_file import can_read

    folder = path.absolute().parent.stat()
    if not can_read(folder.st_uid, path.stat()):
        typer.echo(
            f"{path} is readable only by user id {os.geteuid()}, but its folder belongs to user id "
            f"{folder.st_uid}: if the gateway runs as that user, make it the file's owner (chown)",
            err=True,
        )


def _file(file: Path | None, config: Path | None) -> tuple[Path, list[str] | None]:
    """The key file, and the tenants that the settings declare; None if no settings were named."""
    from interpretops.errors import ConfigError
    from interpretops.settings import load_settings

    if file is not None and config is None:
        return file, None
    settings = load_settings(config)
    path = file or settings.paths.keys
    if path is None:
        raise ConfigError("paths.keys is not set; set it in the file given with --config, or give --file")
    return path, [tenant.id for tenant in settings.tenants]
