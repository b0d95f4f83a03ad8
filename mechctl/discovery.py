"""`mechctl trace`, `sae-train` and `fit-gate`: the offline jobs, each resumable by running it again."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mechctl.options import Artifacts, Config, Model

DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data-folder", help="Where the paths of --data lie, if not beside it.", show_default=False
    ),
]

MeasuredText = Annotated[
    Path | None,
    typer.Option("--text", help="Text to measure on besides; never trained on.", show_default=False),
]
Workers = Annotated[int, typer.Option(help="Processes on this host that share the work.")]
MeasuredTokens = Annotated[int, typer.Option(help="Held-out tokens to measure on, and as many of --text.")]


def _say(line: str) -> None:
    typer.echo(line)


def add_discovery_commands(app: typer.Typer) -> None:
    """Add the offline jobs to `mechctl`."""
    for name, command in (
        ("trace", trace),
        ("sae-train", sae_train),
        ("sae-eval", sae_eval),
        ("fit-gate", fit_gate),
    ):
        app.command(name)(command)


def trace(
    out: Annotated[Path, typer.Option("--out", help="Folder of the trace; an unfinished one goes on.")],
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", help="Layers to trace in one pass, as 8,15,20.", show_default="the middle one"
        ),
    ] = None,
    prompts: Annotated[
        list[Path] | None, typer.Option("--prompts", help="File of prompts: json, jsonl, csv, txt, yaml.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option("--text", help="File of plain text.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="YAML list of files with licences.")] = None,
    data_folder: DataFolder = None,
    context: Annotated[int, typer.Option(help="Most tokens of a sequence.")] = 256,
    answer_tokens: Annotated[
        int, typer.Option(help="Let the model answer each prompt with at most this many tokens.")
    ] = 0,
    written_tokens: Annotated[
        int, typer.Option(help="Length of the texts that the model samples from openings.")
    ] = 0,
    shard_sequences: Annotated[int, typer.Option(help="Sequences of a shard.")] = 256,
    held_out: Annotated[float, typer.Option(help="Share of sequences kept out, to measure on.")] = 0.03,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    sink_ratio: Annotated[
        float, typer.Option(help="Leave out tokens whose norm exceeds this many medians.")
    ] = 8.0,
    seed: Annotated[int, typer.Option(help="Order of the sequences.")] = 0,
    workers: Workers = 1,
    model: Model = None,
    config: Config = None,
) -> None:
    """Run prompts and text through the model and write its residual stream to disk."""
    from discovery import commands as jobs
    from interpretops.settings import load_settings

    jobs.trace(
        load_settings(config, {"model.name": model}),
        prompts=prompts or [],
        text=text or [],
        data=data,
        data_folder=data_folder,
        layers=None if layers is None else _numbers("layers", layers),
        out=out,
        options={
            "context": context,
            "answer_tokens": answer_tokens,
            "written_tokens": written_tokens,
            "shard_sequences": shard_sequences,
            "held_out_share": held_out,
            "dtype": dtype,
            "sink_ratio": sink_ratio,
            "seed": seed,
        },
        workers=workers,
        say=_say,
    )


def sae_train(
    trace: Annotated[Path, typer.Option("--traces", "--trace", help="Folder of a finished trace.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the dictionary; its name is the id.")],
    layer: Annotated[
        int | None,
        typer.Option(
            "--layer", help="Layer of the dictionary.", show_default="the traced one nearest the middle"
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            help="Folder of the checkpoint; an unfinished training goes on.",
            show_default="one of this training's own under runs/sae-train",
        ),
    ] = None,
    width: Annotated[int, typer.Option(help="Number of features.")] = 4096,
    k: Annotated[float, typer.Option(help="Features active per token while training.")] = 32.0,
    tokens: Annotated[
        int | None,
        typer.Option(
            help="Tokens to train on, passes counted.",
            show_default="750000, at most 12 passes over the trace",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Tokens of a step.")] = 1024,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 4e-4,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    workers: Workers = 1,
    text: MeasuredText = None,
    measured_tokens: MeasuredTokens = 20_000,
    model: Model = None,
    config: Config = None,
) -> None:
    """Train a sparse dictionary on a trace with SAELens, and measure it on held-out text."""
    from discovery import commands as jobs
    from interpretops.settings import load_settings

    jobs.sae_train(
        load_settings(config, {"model.name": model}),
        trace=trace,
        out=out,
        work=work,
        text=text,
        measured_tokens=measured_tokens,
        options={
            "layer": layer,
            "width": width,
            "k": k,
            "tokens": tokens,
            "batch": batch,
            "learning_rate": learning_rate,
            "seed": seed,
            "workers": workers,
        },
        say=_say,
    )


def sae_eval(
    dictionary: Annotated[Path, typer.Option("--dictionary", help="Folder of a dictionary with manifest.")],
    trace: Annotated[Path, typer.Option("--trace", help="Trace whose held-out sequences are measured on.")],
    text: MeasuredText = None,
    measured_tokens: MeasuredTokens = 20_000,
    model: Model = None,
    config: Config = None,
) -> None:
    """Measure a dictionary on held-out sequences, beside SAELens' own numbers for the same tokens."""
    from discovery import commands as jobs
    from interpretops.settings import load_settings

    settings = load_settings(config, {"model.name": model})
    jobs.sae_eval(
        settings,
        dictionary=dictionary,
        trace=trace,
        text=text,
        measured_tokens=measured_tokens,
        say=_say,
    )


def fit_gate(
    data: Annotated[Path, typer.Option("--data", help="YAML list of prompt files, split by source.")],
    adapter: Annotated[str, typer.Option("--adapter", help="Id of the adapter that is written.")],
    data_folder: DataFolder = None,
    target_class: Annotated[str, typer.Option(help="Behaviour the edit is against.")] = "jailbreak",
    policy_id: Annotated[str, typer.Option(help="Id of the policy that is written.")] = "jailbreak",
    out: Annotated[
        Path | None, typer.Option("--out", help="File of the policy; else in --work.", show_default=False)
    ] = None,
    work: Annotated[
        Path, typer.Option("--work", help="Folder of checkpoints; an unfinished run goes on.")
    ] = Path("runs/fit-gate"),
    gate_layers: Annotated[
        str, typer.Option(help="Layers at which the probe reads; it decides at the last.")
    ] = "9,12,15",
    heads: Annotated[int, typer.Option(help="Heads of the probe at each of them.")] = 8,
    probes: Annotated[int, typer.Option(help="Probes trained apart; the gate reads their mean.")] = 1,
    join: Annotated[
        list[Path] | None,
        typer.Option(
            "--join", help="Probe file trained before; counts as one probe more.", show_default=False
        ),
    ] = None,
    unseen_numbers: Annotated[
        float, typer.Option(help="Share of each activation that a training step of the probe does not see.")
    ] = 0.2,
    examples: Annotated[int, typer.Option(help="Prompts drawn to train the probe on.")] = 16_000,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight",
            metavar="GROUP=N",
            help="Draw N times as often from a training group, as benign_borderline=4.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Times that the probe sees each.")] = 12,
    benign_budget: Annotated[
        float, typer.Option(help="Share of benign selection prompts that may be refused.")
    ] = 0.02,
    borderline_budget: Annotated[float, typer.Option(help="The same for borderline ones.")] = 0.12,
    layers: Annotated[str, typer.Option("--layers", help="Layers of the edit.")] = "16,19,22",
    rank: Annotated[int, typer.Option(help="ReLU rows at each layer.")] = 16,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 300,
    batch: Annotated[int, typer.Option(help="Harmful prompts of a step; as many benign.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 3e-3,
    benign_weight: Annotated[
        float, typer.Option(help="Weight of sparing benign prompts that open the gate.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of weights and order.")] = 0,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Learn a conditional refusal: an attention probe that opens a gate, and a low-rank edit behind it."""
    from discovery import commands as jobs
    from interpretops.settings import load_settings

    jobs.fit_gate(
        load_settings(config, {"model.name": model, "paths.artifacts": artifacts}),
        data=data,
        data_folder=data_folder,
        adapter=adapter,
        target_class=target_class,
        policy_id=policy_id,
        out=out,
        work=work,
        join=join or (),
        gate={
            "layers": _numbers("gate-layers", gate_layers),
            "heads": heads,
            "probes": probes,
            "unseen_numbers": unseen_numbers,
            "weights": tuple(_weight(text) for text in weight or ()),
            "examples": examples,
            "epochs": epochs,
            "seed": seed,
            "benign_budget": benign_budget,
            "borderline_budget": borderline_budget,
        },
        edit={
            "layers": _numbers("layers", layers),
            "rank": rank,
            "steps": steps,
            "batch": batch,
            "learning_rate": learning_rate,
            "benign_weight": benign_weight,
            "seed": seed,
        },
        say=_say,
    )


def _weight(text: str) -> tuple[str, float]:
    group, _, weight = text.partition("=")
    try:
        return group, float(weight)
    except ValueError:
        typer.secho(f"--weight = {text!r}, but must be a group and a number, as benign_own=2", err=True)
        sys.exit(2)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        typer.secho(f"--{name} = {text!r}, but must be numbers with commas between, as 8,15", err=True)
        sys.exit(2)
