"""`mechctl propose`: from a contrast, features or a circuit to a policy; run again to go on."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mechctl.options import Artifacts, Config, Model


def propose(
    contrast: Annotated[
        Path,
        typer.Option(
            "--contrast", help="Class file (YAML), pairs of `mechctl search`, or a data list of `fit-gate`."
        ),
    ],
    start: Annotated[
        str, typer.Option("--from", help="What decides where to act: contrast, features or circuit.")
    ] = "contrast",
    method: Annotated[
        str, typer.Option("--method", help="Kind of edit: direction, sae-feature, gated-edit or word-rows.")
    ] = "direction",
    policy_id: Annotated[
        str | None, typer.Option("--policy-id", help="Id of the policy; else class and method.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File of the policy; else in --work.", show_default=False)
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", help="Run record; else records/ beside the policy.", show_default=False),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option("--work", help="Folder of finished steps; else runs/propose/<class file>-<method>."),
    ] = None,
    features: Annotated[
        str | None, typer.Option("--features", help="For --from features: ids as 12,40, or a file of them.")
    ] = None,
    circuit: Annotated[
        Path | None, typer.Option("--circuit", help="For --from circuit: a file of `mechctl search`.")
    ] = None,
    dictionary: Annotated[
        str | None, typer.Option("--dictionary", help="Id of the dictionary, where there are several.")
    ] = None,
    gate: Annotated[
        str | None,
        typer.Option(help="probe or features; else features for sae-feature, probe for the others."),
    ] = None,
    gate_layer: Annotated[int | None, typer.Option(help="Layer of the gate; else the edit's first.")] = None,
    layers: Annotated[
        str | None, typer.Option("--layers", help="Layers to try, as 12,15,18; else by the model's depth.")
    ] = None,
    strengths: Annotated[
        str | None, typer.Option("--strengths", help="Strengths to try, as 0.5,1,2; else the method's own.")
    ] = None,
    counts: Annotated[str, typer.Option("--counts", help="Numbers of features to try.")] = "1,2,4,8",
    benign_budget: Annotated[
        float, typer.Option(help="Share of benign selection prompts that may be harmed.")
    ] = 0.02,
    borderline_budget: Annotated[float, typer.Option(help="The same for borderline ones.")] = 0.12,
    text_budget: Annotated[
        float, typer.Option(help="For classes to avoid: most that text may cost, in nats per token.")
    ] = 0.02,
    answer_tokens: Annotated[int, typer.Option(help="Longest answer of the grid.")] = 24,
    most_discovery: Annotated[int, typer.Option(help="Most discovery prompts of a side.")] = 600,
    most_selection: Annotated[int, typer.Option(help="Most selection prompts of a side.")] = 100,
    pairs: Annotated[int, typer.Option(help="Target prompts whose answers are compared.")] = 48,
    steps: Annotated[int, typer.Option(help="Training steps of a gated-edit.")] = 300,
    rank: Annotated[
        int, typer.Option(help="ReLU rows at each layer: of a gated-edit, and most of word-rows.")
    ] = 16,
    suite: Annotated[
        list[str] | None, typer.Option("--suite", help="Name of a suite of the policy; may be repeated.")
    ] = None,
    defense_efficacy_min: Annotated[
        float | None, typer.Option(help="The policy's bar; with one it serves only once its card meets it.")
    ] = None,
    collateral_damage_max: Annotated[float | None, typer.Option(help="The same for damage.")] = None,
    target_class: Annotated[
        str | None, typer.Option("--class", help="Class of the policy; else the contrast's.")
    ] = None,
    data_folder: Annotated[
        Path | None,
        typer.Option("--data-folder", help="Where the contrast's files lie, if not beside it."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of split, choices and training.")] = 0,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Make a policy against a class: fit a gate and an edit, search strength and threshold, write the best.

    Strength and threshold are chosen on selection prompts that nothing else sees, within the budgets. The
    record beside the policy holds every point that was tried.
    """
    from discovery.proposals.command import propose as run
    from discovery.proposals.settings import Budgets, ProposeSettings
    from interpretops.settings import load_settings

    # Values that are not among the choices are refused by name in the job.
    start_as_given: Any = start
    method_as_given: Any = method
    gate_as_given: Any = gate
    run(
        load_settings(config, {"model.name": model, "paths.artifacts": artifacts}),
        ProposeSettings(
            start=start_as_given,
            method=method_as_given,
            contrast=contrast,
            policy_id=policy_id,
            data_folder=data_folder,
            features=features,
            circuit=circuit,
            dictionary=dictionary,
            gate=gate_as_given,
            gate_layer=gate_layer,
            layers=_numbers("layers", layers, int),
            strengths=_numbers("strengths", strengths, float),
            counts=_numbers("counts", counts, int) or (),
            budgets=Budgets(benign_budget, borderline_budget, text_budget),
            answer_tokens=answer_tokens,
            most_discovery=most_discovery,
            most_selection=most_selection,
            pairs=pairs,
            steps=steps,
            rank=rank,
            suites=tuple(suite or ()),
            defense_efficacy_min=defense_efficacy_min,
            collateral_damage_max=collateral_damage_max,
            target_class=target_class,
            seed=seed,
        ),
        out=out,
        record=record,
        work=Path("runs/propose") / f"{contrast.stem}-{method}" if work is None else work,
        say=typer.echo,
    )


def _numbers(name: str, text: str | None, kind: Any) -> Any:
    try:
        return None if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError:
        typer.secho(f"--{name} = {text!r}, but must be numbers with commas between, as 1,2", err=True)
        sys.exit(2)
