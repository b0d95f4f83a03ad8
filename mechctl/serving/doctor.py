"""`mechctl doctor`: checks everything that `mechctl serve` needs; each fault is a line with its remedy."""

import asyncio
import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from mechctl.options.shared_options import Config, Model

if TYPE_CHECKING:
    from interpretops.settings import Settings
    from proxy.doctor import Finding

_MARKS = {"ok": ("ok", "green"), "warning": ("warning", "yellow"), "fault": ("fault", "red")}


def doctor(
    config: Config = None,
    model: Model = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")] = False,
) -> None:
    """Check machine, model, engine, listeners, keys, policies, cards and stores.

    Starts nothing. A fault keeps `mechctl serve` from working as the settings say: its line names the remedy,
    and the exit status is 1. Warnings leave the exit status 0.
    """
    from interpretops.settings import load_settings
    from proxy.serve import new_loop

    settings = load_settings(config, {"model.name": model})
    with asyncio.Runner(loop_factory=new_loop) as runner:
        findings = runner.run(_examine(settings, as_json=as_json))
    faults = sum(finding.state == "fault" for finding in findings)
    warnings = sum(finding.state == "warning" for finding in findings)
    if not as_json:
        typer.echo(f"{len(findings)} checks, {faults} faults, {warnings} warnings")
    if faults:
        raise typer.Exit(1)


async def _examine(settings: "Settings", *, as_json: bool) -> list["Finding"]:
    from proxy.doctor import examine

    found = []
    async for finding in examine(settings, lambda line: typer.echo(line, err=True)):
        found.append(finding)
        if as_json:
            typer.echo(json.dumps(dataclasses.asdict(finding)))
        else:
            mark, colour = _MARKS[finding.state]
            typer.echo(f"{typer.style(f'{mark:<8}', fg=colour)} {finding.subject}: {finding.text}")
    return found
