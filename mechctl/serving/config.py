"""`mechctl config`: shows the settings in force, and where each comes from."""

import dataclasses
import json
from typing import Annotated

import typer

from mechctl.options.shared_options import Config

config_app = typer.Typer(help="Show the settings in force.", no_args_is_help=True)


@config_app.callback()
def _config() -> None:
    """Make `config` a group of commands, although it has only one yet."""


@config_app.command("show")
def show(
    config: Config = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only settings that differ from the default.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Print every setting with its value and where it comes from.

    A flag overrides an environment variable (INTERPRETOPS_GATEWAY_PORT), a variable overrides the file, and
    the file overrides the default. Secrets are hidden. docs/configuration.md says what each setting means.
    """
    from interpretops.settings.origin import DEFAULT, effective_settings

    found = [item for item in effective_settings(config) if not (changed and item.source == DEFAULT)]
    if as_json:
        for item in found:
            typer.echo(json.dumps(dataclasses.asdict(item), ensure_ascii=False))
        return
    width = max((len(item.field) for item in found), default=0)
    for item in found:
        value = json.dumps(item.value, ensure_ascii=False)
        typer.echo(f"{item.field:<{width}}  {value}  {typer.style(f'# {item.source}', dim=True)}")
    if not found:
        typer.echo("every setting has its default")
