"""`mechctl baselines`: writes a policy's baselines as policies that can be served."""

from pathlib import Path
from typing import Annotated

import typer

from discovery.evaluation.options import JobOptions
from interpretops.errors import ConfigError
from mechctl.options.from_settings import Options, Spelled, options_from_models
from mechctl.options.shared_options import SUITE_FILES, Artifacts, Config, Model


@options_from_models
def baselines(
    *,
    chosen: Annotated[
        JobOptions,
        Options(
            {"policy": Spelled(default=""), "data_folder": SUITE_FILES},
            only=("policy", "contrast", "data_folder", "seed"),
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to write; an existing one is replaced.", show_default=False),
    ] = None,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Write a policy's baselines as policies: ungated, random directions, DiffMean.

    `mechctl eval` does this by itself when it starts its own gateway.
    """
    if not chosen.policy or out is None:
        raise ConfigError("baselines needs --policy and --out")
    from discovery.evaluation.baselines.baselines import make_baselines
    from discovery.evaluation.subject import open_subject
    from interpretops.settings import load_settings

    settings = load_settings(config, {"model.name": model, "paths.artifacts": artifacts})
    made = make_baselines(
        open_subject(chosen.policy, settings, typer.echo),
        settings.paths.artifacts,
        out,
        contrast=chosen.contrast,
        data_folder=chosen.data_folder,
        seed=chosen.seed,
    )
    for kind, note in made.notes.items():
        typer.echo(f"{made.ids[kind]}: {note}" if kind in made.ids else f"no {kind}: {note}")
    typer.echo(f"mechctl serve --policies {made.policies} --artifacts {made.artifacts}")
