"""`mechctl eval`: measures policies through the gateway and writes Risk Cards; an interrupted run resumes."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from discovery.evaluation.options import MOST_PARTS, ROUNDS, JobOptions
from interpretops.errors import ConfigError
from mechctl.options.from_settings import LeftOut, Options, Spelled, options_from_models
from mechctl.options.shared_options import SUITE_FILES, Artifacts, Config, Model


@options_from_models
def evaluate(
    *,
    chosen: Annotated[
        JobOptions,
        Options(
            {
                "policy": Spelled(default="all active policies"),
                "suites": "--suite",
                "out": Spelled(default="a folder under runs/ named after the policy"),
                "data_folder": SUITE_FILES,
                "baselines": Spelled(("--baseline",), metavar="KIND=ID"),
                "latency_rounds": Spelled(default=f"{ROUNDS} with --policy, else 0"),
                "parts": Spelled(default=f"{MOST_PARTS} with --policy, else 0"),
            }
        ),
    ],
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="JSON file to write: metrics by suite, and the cards of all measured policies.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", metavar="A B", help="Measure nothing; show two cards side by side."),
    ] = None,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
    left_out: LeftOut,
) -> None:
    """Measure a policy, or all active ones, through the gateway, as clients do, and write its Risk Card.

    Every prompt is answered with the policy, without it, and with its baselines. Answers are kept in `--out`,
    so that the same command resumes an interrupted run.
    """
    if compare is not None:
        from interpretops.riskcard import load_card
        from interpretops.riskcard.markdown import comparison_markdown

        typer.echo(comparison_markdown([load_card(path) for path in compare]), nl=False)
        return
    if not chosen.policy:
        if chosen.publish:
            raise ConfigError("--publish needs --policy: the cards of all active policies have no baselines")
        chosen = replace(
            chosen,
            latency_rounds=0 if "latency_rounds" in left_out else chosen.latency_rounds,
            parts=0 if "parts" in left_out else chosen.parts,
        )
    from discovery.evaluation.command import run_eval
    from interpretops.settings import load_settings

    settings = load_settings(config, {"model.name": model, "paths.artifacts": artifacts})
    run_eval(settings, chosen, report, typer.echo)
