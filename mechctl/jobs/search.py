"""`mechctl search`: searches the circuit behind contrast pairs; an interrupted run resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from discovery.circuits.search_settings import PairFormat, PairSelection, SearchSettings
from mechctl.options.from_settings import LeftOut, Options, Spelled, options_from_models
from mechctl.options.shared_options import Artifacts, Config, Model

PROMPT_PAIRS = 12
"""Most pairs made from `--prompts` unless `--limit` is given: a few minutes on two cores."""
QUICK_PAIRS = 8
QUICK_FEATURES = 8


@options_from_models
def search(
    *,
    out: Annotated[
        Path,
        typer.Option("--out", help="Circuit file to write (.json), or a folder for a file named by its id."),
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
            "paired with one of our harmless prompts that has as many tokens.",
        ),
    ] = None,
    target_class: Annotated[
        str,
        typer.Option("--class", help="Behaviour that the pairs contrast; 'jailbreak' has built-in answers."),
    ] = "jailbreak",
    work: Annotated[
        Path, typer.Option("--work", help="Folder of finished steps; an unfinished run resumes.")
    ] = Path("runs/search"),
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help=f"A first look: at most {QUICK_PAIRS} pairs and {QUICK_FEATURES} features."
        ),
    ] = False,
    pair_format: Annotated[
        PairFormat, Options({"answers": "--answer", "chat": Spelled(default="only with --prompts")})
    ],
    selection: Annotated[
        PairSelection, Options({"limit": Spelled(default=f"all; {PROMPT_PAIRS} of --prompts")})
    ],
    dictionary: Annotated[
        list[str] | None,
        typer.Option(
            "--dictionary",
            "--sae",
            metavar="<str>",
            help="Dictionary, by id or folder, whose features are also scored. May be repeated.",
        ),
    ] = None,
    chosen: Annotated[
        SearchSettings,
        Options({"features": Spelled(default=f"{SearchSettings().features}; {QUICK_FEATURES} with --quick")}),
    ],
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
    left_out: LeftOut,
) -> None:
    """Search the circuit that carries a behaviour, and measure how faithful and how stable it is."""
    from discovery.circuits.command import run_search
    from interpretops.settings import load_settings

    if selection.limit is None:
        limit = QUICK_PAIRS if quick else PROMPT_PAIRS if prompts is not None else None
        selection = replace(selection, limit=limit)
    if quick and "features" in left_out:
        chosen = replace(chosen, features=QUICK_FEATURES)
    run_search(
        load_settings(config, {"model.name": model, "paths.artifacts": artifacts}),
        pairs=pairs,
        prompts=prompts,
        target_class=target_class,
        out=out,
        work=work,
        pair_format=pair_format,
        selection=selection,
        chosen=chosen,
        dictionaries=dictionary or (),
        say=typer.echo,
    )
