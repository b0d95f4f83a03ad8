"""`mechctl audit`: checks that an audit log is unchanged."""

from pathlib import Path
from typing import Annotated

import typer

from mechctl.options.shared_options import Config

audit_app = typer.Typer(name="audit", help="Check the gateway's audit log.", no_args_is_help=True)


@audit_app.callback()
def _options() -> None:
    """Check the gateway's audit log."""


@audit_app.command()
def verify(
    logs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="The log file, with rotated files that were moved; default: `audit.path` of the settings.",
            show_default=False,
        ),
    ] = None,
    first: Annotated[
        int, typer.Option("--first", min=1, help="Number of the first record, if older files were archived.")
    ] = 1,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            metavar="SEQ:HASH",
            help="Number and hash of a record, noted earlier from `GET /admin/audit`.",
        ),
    ] = None,
    config: Config = None,
) -> None:
    """List every line that was changed, removed, inserted or cut off. Exit status 1 if there are any.

    Whoever can write all the files can rewrite them consistently. --head rules that out for every record up
    to the given one.
    """
    from interpretops.errors import ConfigError
    from interpretops.records.audit_chain import head_path, parse_head
    from interpretops.records.audit_chain import verify as check
    from interpretops.settings import load_settings

    kept = None if head is None else parse_head(head)
    if head is not None and kept is None:
        raise ConfigError(f"--head = {head!r}, but must be SEQ:HASH, a number and 64 hex digits")
    named = logs or [path for path in (load_settings(config).audit.path,) if path is not None]
    if not named:
        raise ConfigError("audit.path is not set; set it in the file given with --config, or name the log")
    for path in named:
        if not path.parent.is_dir() or (len(named) > 1 and not path.is_file()):
            raise ConfigError(f"{path}: does not exist; name an audit log")
    # The file that is still written to has a note of its newest record beside it.
    path = next((path for path in named if head_path(path).exists()), named[-1])
    found = check(path, first=first, also=[other for other in named if other != path], kept=kept)
    for line in (*found.notes, *found.faults):
        typer.echo(line)
    if not found.intact:
        raise typer.Exit(1)
    assert found.last is not None
    typer.echo(
        f"{path}: {found.records} records, {found.first} to {found.last.seq}, are unchanged; "
        f"the last has hash {found.last.hash}"
    )
