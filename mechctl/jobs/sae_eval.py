"""`mechctl sae-eval`: measures what a dictionary costs the model, on text that it was not trained on."""

from pathlib import Path
from typing import Annotated

import typer

from mechctl.options.shared_options import Config, MeasuredText, MeasuredTokens, Model


def sae_eval(
    dictionary: Annotated[
        Path, typer.Option("--dictionary", help="Folder of a dictionary with its manifest.")
    ],
    trace: Annotated[Path, typer.Option("--trace", help="Trace whose held-out sequences to measure on.")],
    text: MeasuredText = None,
    measured_tokens: MeasuredTokens = 20_000,
    model: Model = None,
    config: Config = None,
) -> None:
    """Measure a dictionary on held-out sequences, beside SAELens' own numbers for the same tokens."""
    from discovery.sae.command import run_sae_eval
    from interpretops.settings import load_settings

    run_sae_eval(
        load_settings(config, {"model.name": model}),
        dictionary=dictionary,
        trace=trace,
        text=text,
        measured_tokens=measured_tokens,
        say=typer.echo,
    )
