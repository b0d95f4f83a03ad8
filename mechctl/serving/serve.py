"""`mechctl serve` runs the gateway; `mechctl serve-ui` says that there is no dashboard yet."""

from pathlib import Path
from typing import Annotated

import typer

from interpretops.errors import ConfigError
from mechctl.options.shared_options import Artifacts, Config, Model


def serve(
    config: Config = None,
    model: Model = None,
    policies: Annotated[
        Path | None,
        typer.Option("--policies", help="Folder of policies; overrides the settings.", show_default=False),
    ] = None,
    artifacts: Artifacts = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on.", show_default="127.0.0.1")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option("--port", help="Port of the endpoint; 0 picks a free one.", show_default="8000"),
    ] = None,
    admin_port: Annotated[
        int | None,
        typer.Option(
            "--admin-port", help="Port of admin routes and metrics; 0 picks a free one.", show_default="8001"
        ),
    ] = None,
    engine_url: Annotated[
        list[str] | None,
        typer.Option(
            "--engine-url",
            metavar="<url>",
            help="URL of a running `vllm serve` with our plugin; may be repeated. Without it, an engine is "
            "started here.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a model behind an OpenAI-style endpoint, steered per request by policies."""
    from interpretops.settings import load_settings
    from proxy.http.aiohttp_version import check_aiohttp

    check_aiohttp()  # before importing names that another aiohttp may lack
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


def serve_ui(config: Config = None) -> None:
    """Serve the dashboard (not in this version)."""
    from interpretops.settings import load_settings

    load_settings(config)
    raise ConfigError(
        "serve-ui: the dashboard comes with the control plane, which this version does not have; "
        "`mechctl serve` has metrics and /admin/policies on 127.0.0.1:8001"
    )
