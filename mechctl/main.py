"""`mechctl`: puts the commands together. A command imports what does its work only when it runs."""

import sys
from typing import Annotated

import typer

from interpretops import __version__
from interpretops.errors import InterpretOpsError
from mechctl.jobs.baselines import baselines
from mechctl.jobs.circuits import circuits
from mechctl.jobs.evaluate import evaluate
from mechctl.jobs.fit_gate import fit_gate
from mechctl.jobs.propose import propose
from mechctl.jobs.report import report
from mechctl.jobs.sae_eval import sae_eval
from mechctl.jobs.sae_train import sae_train
from mechctl.jobs.search import search
from mechctl.jobs.trace import trace
from mechctl.policies.policy import policy_app
from mechctl.policies.steer import steer
from mechctl.serving.audit import audit_app
from mechctl.serving.config import config_app
from mechctl.serving.doctor import doctor
from mechctl.serving.keys import keys_app
from mechctl.serving.serve import serve, serve_ui
from mechctl.serving.transcripts import transcripts_app

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
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(audit_app, name="audit")
app.add_typer(transcripts_app, name="transcripts")
app.command("serve")(serve)
app.command("serve-ui")(serve_ui)
app.command("doctor")(doctor)
app.command("steer")(steer)
app.command("search")(search)
app.command("circuits")(circuits)
app.command("propose")(propose)
app.command("trace")(trace)
app.command("sae-train")(sae_train)
app.command("sae-eval")(sae_eval)
app.command("fit-gate")(fit_gate)
app.command("eval")(evaluate)
app.command("baselines")(baselines)
app.command("report")(report)


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
    """Entry point. An error is one line per fault on stderr and exit status 2, never a traceback."""
    try:
        app()
    except InterpretOpsError as error:
        for line in str(error).splitlines():
            typer.secho(line, fg=typer.colors.RED, err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
