"""`mechctl`: every command is a thin function here that imports its work when it is called."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from interpretops import __version__
from interpretops.errors import ConfigError, InterpretOpsError
from mechctl.audit import audit_app
from mechctl.baselines import baselines
from mechctl.circuits import circuits
from mechctl.config import config_app
from mechctl.doctor import doctor
from mechctl.evaluate import evaluate
from mechctl.fit_gate import fit_gate
from mechctl.keys import keys_app
from mechctl.options import Artifacts, Config, Model
from mechctl.policy import policy_app
from mechctl.propose import propose
from mechctl.report import report
from mechctl.sae_eval import sae_eval
from mechctl.sae_train import sae_train
from mechctl.search import search
from mechctl.steer import steer
from mechctl.trace import trace
from mechctl.transcripts import transcripts_app

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


@app.command()
def serve(
    config: Config = None,
    model: Model = None,
    policies: Annotated[
        Path | None,
        typer.Option("--policies", help="Folder of policies; else the settings'.", show_default=False),
    ] = None,
    artifacts: Artifacts = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None, typer.Option("--port", help="Port of the endpoint; 0: any free one.", show_default="8000")
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option("--admin-port", help="Port of admin routes and metrics; 0: any.", show_default="8001"),
    ] = None,
    engine_url: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-url",
            metavar="<url>",
            help="A running `vllm serve` with our plugin; may be repeated. Else one is started here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a model behind an OpenAI-style endpoint, steered per request by policies."""
    from interpretops.settings import load_settings
    from proxy.http.aiohttp_version import check_aiohttp

    check_aiohttp()  # before the import of what another aiohttp may not have
    from proxy.serve import serve as run

    overrides = {
        "model.name": model,
        "paths.policies": policies,
        "paths.artifacts": artifacts,
        "gateway.host": host,
        "gateway.port": port,
        "gateway.admin_port": admin_port,
        "engine.url": engine_url or None,
    }
    run(load_settings(config, overrides))


@app.command("serve-ui")
def serve_ui(config: Config = None) -> None:
    """Serve the dashboard (not in this version)."""
    from interpretops.settings import load_settings

    load_settings(config)
    raise ConfigError(
        "serve-ui: the dashboard comes with the control plane, which this version does not have; "
        "`mechctl serve` has metrics and /admin/policies on 127.0.0.1:8001"
    )


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
