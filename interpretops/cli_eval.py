"""`mechctl eval` and `mechctl report`: measuring a policy, and showing what was measured."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from interpretops.cli_options import Artifacts, Config, Model
from interpretops.errors import ConfigError


class Form(StrEnum):
    """How a card is shown."""

    MARKDOWN = "md"
    HTML = "html"


def add_eval_commands(app: typer.Typer) -> None:
    """Add the two commands to `mechctl`."""
    app.command("eval")(evaluate)
    app.command("report")(report)


def report(
    card: Annotated[Path, typer.Argument(help="A Risk Card (JSON).", show_default=False)],
    form: Annotated[Form, typer.Option("--format", help="Markdown or one HTML file.")] = Form.MARKDOWN,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; else stdout.", show_default=False)
    ] = None,
) -> None:
    """Show a Risk Card as Markdown or as one self-contained HTML file."""
    from interpretops.atomic_file import write_atomically
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


def evaluate(
    policy: Annotated[
        str | None, typer.Option("--policy", help="Id of the policy, or its file.", show_default=False)
    ] = None,
    suite: Annotated[
        Path | None, typer.Option("--suite", help="YAML file of the suite.", show_default=False)
    ] = None,
    url: Annotated[str, typer.Option("--url", help="The gateway.")] = "http://127.0.0.1:8000",
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder of answers and card; an unfinished run goes on.", show_default=False
        ),
    ] = None,
    data_folder: Annotated[
        str | None,
        typer.Option(
            "--data-folder", help="Folder or URL of the suite's files, if not beside it.", show_default=False
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    concurrency: Annotated[int, typer.Option(help="Requests in flight.")] = 16,
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
    circuit: Annotated[
        Path | None,
        typer.Option(
            "--circuit", help="Circuit file of the model: gives the card CCS and CS.", show_default=False
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
    """Measure a policy through the gateway, as users meet it, and write its Risk Card.

    Every prompt of the suite is answered with and without the policy. Answers are kept in `--out`; the same
    command goes on where it stood.
    """
    if compare is not None:
        from interpretops.riskcard import load_card
        from interpretops.riskcard.markdown import comparison_markdown

        typer.echo(comparison_markdown([load_card(path) for path in compare]), nl=False)
        return
    if policy is None or suite is None or out is None:
        raise ConfigError("eval needs --policy, --suite and --out, or --compare with two cards")
    from discovery.evaluation.job import JobOptions, evaluate_policy
    from interpretops.settings import load_settings

    evaluate_policy(
        load_settings(config, {"model.name": model, "paths.artifacts": artifacts}),
        JobOptions(
            policy=policy,
            suite=suite,
            url=url,
            out=out,
            data_folder=data_folder,
            max_tokens=max_tokens,
            concurrency=concurrency,
            seed=seed,
            judge_url=judge_url,
            judge_model=judge_model,
            moderation_url=moderation_url,
            moderation_model=moderation_model,
            circuit=circuit,
            baselines=tuple(baseline or ()),
        ),
        say=typer.echo,
    )
