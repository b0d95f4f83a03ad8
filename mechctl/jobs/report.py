"""`mechctl report`: shows a Risk Card."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from interpretops.errors import ConfigError
from mechctl.options.shared_options import Config


class Form(StrEnum):
    """How a card is shown."""

    MARKDOWN = "md"
    HTML = "html"


def report(
    card: Annotated[Path | None, typer.Argument(help="A Risk Card (JSON).", show_default=False)] = None,
    form: Annotated[Form, typer.Option("--format", help="Markdown or one HTML file.")] = Form.MARKDOWN,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", "--out", help="File to write; default: standard output.", show_default=False
        ),
    ] = None,
    circuit_id: Annotated[
        str | None,
        typer.Option(
            "--circuit-id", help="Circuit to report on, as PDF (not in this version).", show_default=False
        ),
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
        raise ConfigError("report needs a Risk Card (JSON), such as policies/cards/jailbreak.json")
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
