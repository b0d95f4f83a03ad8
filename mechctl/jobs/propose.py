"""`mechctl propose`: makes a policy from a contrast, features or a circuit; an interrupted run resumes."""

from pathlib import Path
from typing import Annotated

import typer

from discovery.proposals.settings import ProposeSettings
from mechctl.options.from_settings import Options, Spelled, options_from_models
from mechctl.options.shared_options import Artifacts, Config, Model


@options_from_models
def propose(
    *,
    chosen: Annotated[
        ProposeSettings,
        Options(
            {
                "start": "--from",
                "policy_id": Spelled(default="class and method"),
                "gate": Spelled(default="features for sae-feature, probe for the others"),
                "gate_layer": Spelled(default="the edit's first layer"),
                "layers": Spelled(default="by the model's depth"),
                "strengths": Spelled(default="the method's own"),
                "budgets.benign": "--benign-budget",
                "budgets.borderline": "--borderline-budget",
                "budgets.text": "--text-budget",
                "suites": "--suite",
                "target_class": Spelled(("--class",), default="the contrast's"),
            }
        ),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="Policy file to write.", show_default="in --work")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", help="Run record to write.", show_default="in records/ beside the policy"),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            help="Folder of finished steps; an unfinished run resumes.",
            show_default="under runs/propose, named after contrast and method",
        ),
    ] = None,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Make a policy against a class: fit a gate and an edit, search strength and threshold, write the best.

    Strength and threshold are chosen within the budgets, on selection prompts that are used for nothing else.
    The record beside the policy holds every point that was tried.
    """
    from discovery.proposals.command import run_propose
    from interpretops.settings import load_settings

    run_propose(
        load_settings(config, {"model.name": model, "paths.artifacts": artifacts}),
        chosen,
        out=out,
        record=record,
        work=Path("runs/propose") / f"{chosen.contrast.stem}-{chosen.method}" if work is None else work,
        say=typer.echo,
    )
