"""`mechctl policy diff`: shows how two policies and their Risk Cards differ."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interpretops.errors import PolicyError
from mechctl.options.shared_options import Artifacts, Config, Model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from interpretops.compile.difference import Change
    from interpretops.riskcard import Standing
    from interpretops.settings import Settings


def diff(
    before: Annotated[str, typer.Argument(help="Policy file, or the id of a policy.", show_default=False)],
    after: Annotated[str, typer.Argument(help="Policy file or id to compare with it.", show_default=False)],
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Show how two policies differ: edits, gates, thresholds, criteria, and their Risk Cards.

    Both are compiled for the model, so that a changed adapter or dictionary shows even if the files are the
    same. Cards are read from `cards/` beside each file. Exit status 1 if the policies differ, as with `diff`.

    To compare with a committed version: `git show main:policies/jailbreak.yaml > /tmp/before.yaml`.
    """
    from interpretops.compile import compile_policy
    from interpretops.compile.difference import plan_changes, policy_changes
    from interpretops.model.source import resolve_model
    from interpretops.model.spec import read_model_spec
    from interpretops.policy import load_policy
    from interpretops.riskcard import card_for
    from interpretops.settings import load_settings

    settings = load_settings(config, {"model.name": model, "paths.artifacts": artifacts})
    files = [_find(name, settings) for name in (before, after)]
    policies = [load_policy(file) for file in files]
    spec = read_model_spec(
        resolve_model(
            settings.model.name,
            settings.cache.dir,
            lambda line: typer.echo(line, err=True),
            revision=settings.model.revision,
        )
    )
    plans = [compile_policy(policy, model=spec, artifacts=settings.paths.artifacts) for policy in policies]
    standings = [
        card_for(policy, plan.revision, file.parent)
        for policy, plan, file in zip(policies, plans, files, strict=True)
    ]
    names = [f"{plan.policy_id}@{plan.revision[:12]}" for plan in plans]
    same = plans[0].revision == plans[1].revision
    changes = [*policy_changes(policies[0], policies[1]), *plan_changes(plans[0], plans[1])]
    _show(names, changes, standings)
    if same and not changes:
        typer.echo(f"the same: both are {names[0]}")
        return
    if same:
        typer.echo(f"the engine would apply the same numbers: both are {names[0]}")
    raise typer.Exit(1)


def _find(name: str, settings: "Settings") -> Path:
    """The named file, or the policy of `paths.policies` with this id."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    folder = settings.paths.policies
    for found in (folder / f"{name}.yaml", folder / name / "policy.yaml"):
        if found.is_file():
            return found
    raise PolicyError(
        f"{name}: is not a file, and {folder} holds no policy with that id; name a file or an id"
    )


def _show(names: "Sequence[str]", changes: "Sequence[Change]", standings: "Sequence[Standing]") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from interpretops.riskcard.card import MEASURES
    from interpretops.riskcard.table import with_interval

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, header_style="bold")
    for head in ("", *names):
        table.add_column(head, overflow="fold")
    for section in dict.fromkeys(change.section for change in changes):
        table.add_row(Text(section, style="bold"), "", "")
        for change in changes:
            if change.section == section:
                table.add_row(f"  {change.place}", Text(change.before), Text(change.after))
    cards = [standing.card for standing in standings]
    table.add_row(Text("Risk Card", style="bold"), "", "")
    verdicts = ["-" if s.verdict is None else s.verdict.status for s in standings]
    table.add_row("  verdict", *verdicts)
    for measure, (short, _) in MEASURES.items():
        shown = ["-" if card is None else with_interval(measure, card.measures[measure]) for card in cards]
        if set(shown) - {"-", "absent"}:
            table.add_row(f"  {short}", *shown)
    if changes or names[0] != names[1]:
        console.print(table)
    for standing in standings:
        if standing.card is None:
            console.print(standing.reason, markup=False)
