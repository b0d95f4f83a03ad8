"""`mechctl transcripts`: makes keys for stored requests, and decrypts these."""

from datetime import datetime
from typing import Annotated

import typer

from mechctl.options.shared_options import Config

transcripts_app = typer.Typer(
    name="transcripts", help="Requests stored for tenants, encrypted on disk.", no_args_is_help=True
)


@transcripts_app.callback()
def _options() -> None:
    """Requests stored for tenants, encrypted on disk."""


@transcripts_app.command()
def key() -> None:
    """Make a key. Put it first in the variable or file that a tenant's `transcripts.key` names."""
    from interpretops.records.transcript_file import make_key

    typer.echo(make_key())


@transcripts_app.command()
def read(
    tenant: Annotated[str, typer.Option("--tenant", help="Tenant whose requests to print.")],
    day: Annotated[
        datetime | None, typer.Option("--day", formats=["%Y-%m-%d"], help="Only this day (UTC).")
    ] = None,
    request_id: Annotated[str | None, typer.Option("--request-id", help="Only this request.")] = None,
    key: Annotated[
        str | None, typer.Option("--key", help="`env:NAME` or `file:PATH`; default: the tenant's setting.")
    ] = None,
    config: Config = None,
) -> None:
    """Print stored requests as JSON lines, oldest first. Exit status 1 if a line cannot be decrypted."""
    import json

    from interpretops.errors import ConfigError
    from interpretops.records.transcript_file import Vault
    from interpretops.records.transcript_file import read as lines
    from interpretops.settings import load_settings

    settings = load_settings(config)
    declared = {one.id: one.transcripts for one in settings.tenants}
    if tenant not in declared and key is None:
        known = ", ".join(sorted(declared)) or "none"
        raise ConfigError(f"--tenant {tenant!r}, but tenants declares {known}; name one, or give its --key")
    own = declared.get(tenant)
    reference = key or (None if own is None else own.key)
    if reference is None:
        raise ConfigError(f"tenant {tenant!r} has no transcripts.key; give --key")
    vault, closed = Vault(tenant, reference), 0
    folder, wanted = settings.transcripts_dir.expanduser(), None if day is None else day.date()
    for place, line in lines(folder, tenant, wanted):
        record = vault.open(line)
        if record is None:
            closed += 1
            typer.echo(f"{place}: cannot be decrypted with these keys, or is damaged", err=True)
        elif request_id is None or record.get("request_id") == request_id:
            typer.echo(json.dumps(record, ensure_ascii=False))
    if closed:
        raise typer.Exit(1)
