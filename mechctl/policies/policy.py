"""`mechctl policy …`: checks, compiles and documents policies."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from interpretops.errors import PolicyError
from mechctl.options.shared_options import Artifacts, Config, Model
from mechctl.policies.policy_diff import diff

if TYPE_CHECKING:
    from interpretops.plan import Plan

policy_app = typer.Typer(help="Check, compile, compare and document policies.", no_args_is_help=True)
policy_app.command("diff")(diff)


@policy_app.command("validate")
def validate(
    files: Annotated[list[Path], typer.Argument(help="Policy files.", show_default=False)],
) -> None:
    """Check policy files by themselves: keys, types, ranges, names.

    Needs no model. Every fault is one line with file, field, value and line number; exit status 2 if there
    are any. `mechctl policy compile` checks whether layers, heads and features exist.
    """
    from interpretops.policy import load_policy

    faults: list[str] = []
    for file in files:
        try:
            policy = load_policy(file)
        except PolicyError as error:
            faults += error.lines
        else:
            typer.echo(f"{file}: {policy.meta.id} is valid, {len(policy.interventions)} interventions")
    if faults:
        raise PolicyError(*faults)


@policy_app.command("compile")
def compile_(
    file: Annotated[Path, typer.Argument(help="Policy file.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="Folder to write the plan to; default: paths.plans.", show_default=False
        ),
    ] = None,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Compile a policy for a model and show what the plan does.

    The plan is one safetensors file named by its sha256, the revision; the same inputs give the same bytes.
    With `-o`, or `paths.plans` in the settings, it is written, and its path is the last line.
    """
    from interpretops.compile import compile_policy
    from interpretops.model.source import resolve_model
    from interpretops.model.spec import read_model_spec
    from interpretops.policy import load_policy
    from interpretops.settings import load_settings

    policy = load_policy(file)
    settings = load_settings(config, {"model.name": model, "paths.artifacts": artifacts})
    folder = resolve_model(
        settings.model.name,
        settings.cache.dir,
        lambda line: typer.echo(line, err=True),
        revision=settings.model.revision,
    )
    plan = compile_policy(policy, model=read_model_spec(folder), artifacts=settings.paths.artifacts)
    _show_plan(plan)
    if (folder_of_plans := output or settings.paths.plans) is not None:
        typer.echo(plan.save(folder_of_plans))


@policy_app.command("schema")
def schema() -> None:
    """Print the JSON Schema of policy files, for editors.

    VS Code with its YAML extension: save it as policy.schema.json, and begin policies with
    `# yaml-language-server: $schema=policy.schema.json`.
    """
    from interpretops.policy import policy_schema

    typer.echo(json.dumps(policy_schema(), indent=2))


@policy_app.command("reference")
def reference() -> None:
    """Print the reference page of policy files (docs/policy-reference.md)."""
    from interpretops.policy.reference import policy_reference

    typer.echo(policy_reference(), nl=False)


def _show_plan(plan: "Plan") -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{plan.policy_id}[/] for {plan.model.name}")
    console.print(f"revision {plan.revision}")
    table = Table("site", "rank-one edits", "head scales", "TopK encoder", "gates", box=None)
    for site, edits in sorted(plan.edits.items(), key=lambda item: item[0].order):
        used = set(edits.units.gate.tolist())
        scales = 0
        if edits.head_scale is not None:
            scales = len(edits.head_scale.gate)
            used |= set(edits.head_scale.gate.tolist())
        encoder = "" if edits.topk is None else f"{len(edits.topk.bias)} features, k {edits.topk.k}"
        gates = ", ".join("always" if index == 0 else f"{index}" for index in sorted(used))
        table.add_row(str(site), str(len(edits.units)), str(scales), encoder, gates)
    console.print(table)
    for index, gate in enumerate(plan.gates[1:], start=1):
        phase = "prompt and answer" if gate.phase == "both" else gate.phase
        reads = "open" if gate.site is None else f"{gate.combine} of {len(gate)} at {gate.site}, {gate.scope}"
        if gate.probe:
            reads = f"attention probe at {', '.join(str(part.site) for part in gate.probe)}, {gate.scope}"
            reads += f" in windows of {gate.window} tokens" if gate.window else ""
            reads += f", {gate.prompt_weight:+g} x gate {gate.beside}" if gate.beside is not None else ""
        latch = ", latched" if gate.latched else ""
        refusal = "" if gate.refusal is None else ", open means a refusal"
        console.print(f"gate {index}: {reads}{latch}, acts on {phase}{refusal}")
    unbounded = [str(site) for site, edits in plan.edits.items() if np.isinf(edits.units.max_norm).any()]
    if unbounded:
        console.print(
            f"no norm bound at {', '.join(unbounded)}: attention sinks are edited too; set max_norm, or "
            "record the model's bounds in norm-bounds.yaml",
            markup=False,
        )
    for kind, items in plan.provenance.items():
        for name, record in items.items():
            console.print(f"{kind}: {name} sha256 {record['sha256']}", markup=False)
