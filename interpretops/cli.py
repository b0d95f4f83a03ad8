"""`mechctl`: every command is a thin function here that imports its work when it is called."""

import sys
from typing import Annotated

import typer

from interpretops import __version__
from interpretops.cli_policy import policy_app
from interpretops.errors import InterpretOpsError

app = typer.Typer(
    name="mechctl",
    help=(
        "Edits a language model's activations per request, the way a YAML policy says.\n\n"
        "Start with `mechctl serve`: an OpenAI-style endpoint on http://127.0.0.1:8000/v1. "
        "Write a policy, check it with `mechctl policy validate`, see it act with `mechctl steer`."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(policy_app, name="policy")


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"mechctl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version


def main() -> None:
    """Entry point: a refusal is one line per fault on stderr and exit status 2, never a traceback."""
    try:
        app()
    except InterpretOpsError as error:
        for line in str(error).splitlines():
            typer.secho(line, fg=typer.colors.RED, err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
