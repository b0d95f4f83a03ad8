"""`mechctl eval`, `baselines` and `report`: measuring a policy, and showing what was measured."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from interpretops.errors import ConfigError
from mechctl.options import Artifacts, Config, Model


class Form(StrEnum):
    """How a card is shown."""

    MARKDOWN = "md"
    HTML = "html"


def add_eval_commands(app: typer.Typer) -> None:
    """Add the three commands to `mechctl`."""
    app.command("eval")(evaluate)
    app.command("baselines")(baselines)
    app.command("report")(report)


def report(
    card: Annotated[Path | None, typer.Argument(help="A Risk Card (JSON).", show_default=False)] = None,
    form: Annotated[Form, typer.Option("--format", help="Markdown or one HTML file.")] = Form.MARKDOWN,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", "--out", help="File to write; else stdout.", show_default=False),
    ] = None,
    circuit_id: Annotated[
        str | None,
        typer.Option("--circuit-id", help="A circuit of `mechctl circuits`, as PDF.", show_default=False),
    ] = None,
    config: Config = None,
) -> None:
    """Show a Risk Card as Markdown or as one self-contained HTML file."""
    if circuit_id is not None:
        from interpretops.circuit.store import CircuitStore
        from interpretops.settings import load_settings

        CircuitStore(load_settings(config).circuits_dir).load(circuit_id)
        raise ConfigError(
            f"report --circuit-id {circuit_id}: reports of circuits come with the control plane, which this "
            "version does not have; `mechctl report CARD` shows a Risk Card"
        )
    if card is None:
        raise ConfigError("report needs a Risk Card (JSON), as policies/cards/jailbreak.json")
    from interpretops.files.atomic_file import write_atomically
    from interpretops.riskcard import load_card
    from interpretops.riskcard.markdown import card_markdown
    from interpretops.riskcard.page import card_html

    loaded = load_card(card)
    text = card_html(loaded) if form is Form.HTML else card_markdown(loaded)
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        write_atomically(output, text.encode())
    except OSError as error:
        raise ConfigError(f"--output = {output}: cannot be written ({error.strerror or error})") from error
    typer.echo(output)


Policy = Annotated[
    str | None, typer.Option("--policy", help="Id of the policy, or its file.", show_default=False)
]
DataFolder = Annotated[
    str | None,
    typer.Option(
        "--data-folder",
        envvar="INTERPRETOPS_DATA",
        help="Folder or URL of the suites' files, if not beside them.",
        show_default=False,
    ),
]
Contrast = Annotated[
    Path | None,
    typer.Option(
        "--contrast",
        help="Prompts that the DiffMean baseline is made of; else those that we bring for the class.",
        show_default=False,
    ),
]


def baselines(
    policy: Policy = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; it is made anew.", show_default=False)
    ] = None,
    contrast: Contrast = None,
    data_folder: DataFolder = None,
    seed: Annotated[int, typer.Option(help="Seed of the random directions.")] = 0,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Write a policy's baselines as policies: ungated, random directions, DiffMean.

    `mechctl eval` does so by itself when it starts its own gateway.
    """
    if policy is None or out is None:
        raise ConfigError("baselines needs --policy and --out")
    from discovery.evaluation.baselines.baselines import make_baselines
    from discovery.evaluation.subject import open_subject
    from interpretops.settings import load_settings

    settings = load_settings(config, {"model.name": model, "paths.artifacts": artifacts})
    made = make_baselines(
        open_subject(policy, settings, typer.echo),
        settings.paths.artifacts,
        out,
        contrast=contrast,
        data_folder=data_folder,
        seed=seed,
    )
    for kind, note in made.notes.items():
        typer.echo(f"{made.ids[kind]}: {note}" if kind in made.ids else f"no {kind}: {note}")
    typer.echo(f"mechctl serve --policies {made.policies} --artifacts {made.artifacts}")


def evaluate(
    policy: Policy = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            help="File, URL or name of a suite; may be repeated. Else those that the policy names.",
            show_default=False,
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url", help="A running gateway; else one is started for this run.", show_default=False
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of answers and card; an unfinished run goes on.",
            show_default="runs/eval-<policy>",
        ),
    ] = None,
    data_folder: DataFolder = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 40,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 32,
    limit: Annotated[
        int | None, typer.Option(help="Most prompts of each role, for a quick look.", show_default=False)
    ] = None,
    baseline_limit: Annotated[
        int, typer.Option(help="Most prompts of each role for served baselines; 0: none.")
    ] = 40,
    answer_limit: Annotated[int, typer.Option(help="Most own answers whose likelihood is read.")] = 60,
    judge_url: Annotated[
        str | None,
        typer.Option(
            "--judge-url", help="OpenAI-compatible model that judges refusals instead of the phrase list."
        ),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", help="Its name; OPENAI_API_KEY is its key.")
    ] = None,
    moderation_url: Annotated[
        str | None,
        typer.Option(
            "--moderation-url",
            help="OpenAI-compatible moderation: an attack succeeds when it flags the answer.",
        ),
    ] = None,
    moderation_model: Annotated[
        str | None, typer.Option("--moderation-model", help="Its model; else its default.")
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            "--baseline",
            help="KIND=POLICY: a served policy as baseline; random_direction, ungated or diffmean.",
        ),
    ] = None,
    contrast: Contrast = None,
    circuit: Annotated[
        Path | None,
        typer.Option(
            "--circuit",
            help="Gives the card CS: the circuit file that the policy names; else that among the artifacts.",
            show_default=False,
        ),
    ] = None,
    latency_rounds: Annotated[
        int | None,
        typer.Option(
            help="Rounds of timing for LCO, a minute at most; 0: none.",
            show_default="12 with --policy, else 0",
        ),
    ] = None,
    parts: Annotated[
        int | None,
        typer.Option(
            help="Most parts of the policy that are ablated for CCS; 0: none.",
            show_default="32 with --policy, else 0",
        ),
    ] = None,
    prefix_cache: Annotated[
        bool | None,
        typer.Option(
            "--prefix-cache/--no-prefix-cache",
            help="Of this run's own engine; else as the engine likes.",
            show_default=False,
        ),
    ] = None,
    publish: Annotated[
        bool, typer.Option("--publish", help="Put the card into `cards/` of the folder of policies.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            help="JSON file to write: each suite's metrics and the cards of all policies that were measured.",
            show_default=False,
        ),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option("--compare", help="Measure nothing; show two cards side by side.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling and resampling.")] = 0,
    model: Model = None,
    artifacts: Artifacts = None,
    config: Config = None,
) -> None:
    """Measure a policy, or all active ones, through the gateway, as users meet it, and write its Risk Card.

    Every prompt is answered with and without the policy, and by its baselines. Answers are kept in `--out`;
    the same command goes on where it stood.
    """
    if compare is not None:
        from interpretops.riskcard import load_card
        from interpretops.riskcard.markdown import comparison_markdown

        typer.echo(comparison_markdown([load_card(path) for path in compare]), nl=False)
        return
    if policy is None and publish:
        raise ConfigError("--publish needs --policy: the cards of all active policies have no baselines")
    from discovery.evaluation.command import run_eval
    from discovery.evaluation.measures.contributions import MOST_PARTS
    from discovery.evaluation.measures.latency import ROUNDS
    from discovery.evaluation.options import JobOptions
    from interpretops.settings import load_settings

    run_eval(
        load_settings(config, {"model.name": model, "paths.artifacts": artifacts}),
        JobOptions(
            policy=policy or "",
            suites=tuple(suite or ()),
            url=url,
            out=out,
            data_folder=data_folder,
            max_tokens=max_tokens,
            concurrency=concurrency,
            seed=seed,
            limit=limit,
            baseline_limit=baseline_limit,
            answer_limit=answer_limit,
            contrast=contrast,
            judge_url=judge_url,
            judge_model=judge_model,
            moderation_url=moderation_url,
            moderation_model=moderation_model,
            circuit=circuit,
            latency_rounds=(ROUNDS if policy else 0) if latency_rounds is None else latency_rounds,
            parts=(MOST_PARTS if policy else 0) if parts is None else parts,
            baselines=tuple(baseline or ()),
            prefix_cache=prefix_cache,
            publish=publish,
        ),
        report,
        typer.echo,
    )
