"""`mechctl search`: contrast pairs in, circuit out; run again to go on."""

from pathlib import Path
from typing import Annotated, Any

import typer

from mechctl.options import Artifacts, Config, Model

PROMPT_PAIRS = 12
"""Pairs that are made of `--prompts` unless `--limit` says otherwise: a few minutes on two cores."""
QUICK = {"limit": 8, "features": 8}


def search(
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Circuit file that is written (.json), or a folder: then it is named by its id."
        ),
    ],
    pairs: Annotated[
        Path | None,
        typer.Option("--pairs", help="Contrast pairs, jsonl or csv: clean, corrupted, answer, wrong."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Instead of pairs, prompts that show the behaviour: json, jsonl, csv, txt, yaml. Each is "
            "set beside a harmless one of ours that has as many tokens.",
        ),
    ] = None,
    target_class: Annotated[
        str, typer.Option("--class", help="Behaviour that the pairs contrast; 'jailbreak' knows its answers.")
    ] = "jailbreak",
    work: Annotated[
        Path, typer.Option("--work", help="Folder of finished steps; an unfinished run goes on.")
    ] = Path("runs/search"),
    layout: Annotated[str, typer.Option(help="Columns of the file: pairs, ioi or greater-than.")] = "pairs",
    corrupted_column: Annotated[str, typer.Option(help="Column of the corrupted prompts.")] = "corrupted",
    answer: Annotated[
        list[str] | None, typer.Option("--answer", help="Favoured answer of all pairs; may be repeated.")
    ] = None,
    wrong: Annotated[
        list[str] | None, typer.Option("--wrong", help="Disfavoured answer of all pairs; may be repeated.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Put prompts into the model's chat format.",
            show_default="only with --prompts",
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help=f"A first look: at most {QUICK['limit']} pairs and {QUICK['features']} features."
        ),
    ] = False,
    skip_unfit: Annotated[
        bool, typer.Option("--skip-unfit", help="Leave out pairs of unequal length instead of refusing.")
    ] = False,
    held_out: Annotated[float, typer.Option(help="Share of pairs that only measure.")] = 0.5,
    limit: Annotated[
        int | None, typer.Option(help="Most pairs taken.", show_default=f"all; {PROMPT_PAIRS} of --prompts")
    ] = None,
    metric: Annotated[str, typer.Option(help="logit_diff, log_odds or prob_diff.")] = "logit_diff",
    edges: Annotated[int, typer.Option(help="Most edges of the circuit.")] = 200,
    steps: Annotated[int, typer.Option(help="Interpolation steps of EAP-IG, at least 5.")] = 5,
    seeds: Annotated[int, typer.Option(help="Seeds of the stability measure, at least 5.")] = 5,
    resamples: Annotated[int, typer.Option(help="Bootstrap resamples of each seed.")] = 4,
    random_circuits: Annotated[
        int, typer.Option(help="Random circuits of the same sizes, at least 20.")
    ] = 20,
    dictionary: Annotated[
        list[str] | None,
        typer.Option(
            "--dictionary",
            "--sae",
            help="Dictionary whose features are scored too, by id or folder; may be repeated.",
        ),
    ] = None,
    features: Annotated[
        int | None,
        typer.Option(
            help="Features of each dictionary whose contribution is measured exactly.", show_default="32"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Pairs of a forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="First seed of resamples and random circuits.")] = 0,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Search the circuit that carries a behaviour, and measure how faithful and how stable it is."""
    from discovery.circuits import command
    from discovery.circuits.pairs import Reading
    from discovery.circuits.search import SearchSettings
    from interpretops.settings import load_settings

    if limit is None:
        limit = QUICK["limit"] if quick else PROMPT_PAIRS if prompts is not None else None
    if features is None:
        features = QUICK["features"] if quick else 32
    # Values that are not among the choices are refused by name in the job.
    layout_as_given: Any = layout
    metric_as_given: Any = metric
    command.search(
        load_settings(config, {"model.name": model, "paths.artifacts": artifacts}),
        pairs=pairs,
        prompts=prompts,
        target_class=target_class,
        out=out,
        work=work,
        reading=Reading(
            layout=layout_as_given,
            corrupted_column=corrupted_column,
            answers=tuple(answer or ()),
            wrong=tuple(wrong or ()),
            chat=prompts is not None if chat is None else chat,
            skip_unfit=skip_unfit,
        ),
        chosen=SearchSettings(
            metric=metric_as_given,
            edges=edges,
            steps=steps,
            seeds=seeds,
            seed=seed,
            resamples=resamples,
            random_circuits=random_circuits,
            batch=batch,
            features=features,
        ),
        held_out=held_out,
        limit=limit,
        dictionaries=dictionary or (),
        say=typer.echo,
    )
