"""`mechctl trace`: stores activations of prompts and text; an interrupted run resumes."""

from pathlib import Path
from typing import Annotated

import typer

from discovery.data.trace_settings import TraceSettings
from mechctl.options.from_settings import Options, Spelled, options_from_models
from mechctl.options.shared_options import Config, DataFolder, Model


@options_from_models
def trace(
    *,
    out: Annotated[Path, typer.Option("--out", help="Folder of the trace; an unfinished one resumes.")],
    prompts: Annotated[
        list[Path] | None,
        typer.Option(
            "--prompts",
            metavar="<path>",
            help="File of prompts: json, jsonl, csv, txt, yaml. May be repeated.",
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", metavar="<path>", help="File of plain text. May be repeated."),
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="YAML list of files with licences.")] = None,
    data_folder: DataFolder = None,
    chosen: Annotated[
        TraceSettings,
        Options({"layers": Spelled(default="the middle one"), "held_out_share": "--held-out"}),
    ],
    workers: Annotated[int, typer.Option(help="Processes on this host that share the work.")] = 1,
    model: Model = None,
    config: Config = None,
) -> None:
    """Run prompts and text through the model and write its residual stream to disk."""
    from discovery.data.command import run_trace
    from interpretops.settings import load_settings

    run_trace(
        load_settings(config, {"model.name": model}),
        prompts=prompts or [],
        text=text or [],
        data=data,
        data_folder=data_folder,
        out=out,
        chosen=chosen,
        workers=workers,
        say=typer.echo,
    )
