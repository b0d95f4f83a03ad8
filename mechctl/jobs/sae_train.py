"""`mechctl sae-train`: trains a sparse dictionary on a trace; an interrupted run resumes."""

from pathlib import Path
from typing import Annotated

import typer

from discovery.sae.train_settings import MOST_PASSES, MOST_TOKENS, TrainSettings
from mechctl.options.from_settings import Options, Spelled, options_from_models
from mechctl.options.shared_options import Config, MeasuredText, MeasuredTokens, Model


@options_from_models
def sae_train(
    *,
    trace: Annotated[Path, typer.Option("--traces", "--trace", help="Folder of a finished trace.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write the dictionary to; its name becomes the id.")
    ],
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            help="Folder of the checkpoint; an unfinished training resumes.",
            show_default="a folder of its own under runs/sae-train",
        ),
    ] = None,
    chosen: Annotated[
        TrainSettings,
        Options(
            {
                "layer": Spelled(default="the traced layer nearest the middle"),
                "tokens": Spelled(default=f"{MOST_TOKENS}, at most {MOST_PASSES} passes over the trace"),
            }
        ),
    ],
    text: MeasuredText = None,
    measured_tokens: MeasuredTokens = 20_000,
    model: Model = None,
    config: Config = None,
) -> None:
    """Train a sparse dictionary on a trace with SAELens, and measure it on held-out text."""
    from discovery.sae.command import run_sae_train
    from interpretops.settings import load_settings

    run_sae_train(
        load_settings(config, {"model.name": model}),
        trace=trace,
        out=out,
        work=work,
        text=text,
        measured_tokens=measured_tokens,
        chosen=chosen,
        say=typer.echo,
    )
