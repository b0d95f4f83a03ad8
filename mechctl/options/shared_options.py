"""Options that several commands of `mechctl` share, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

from mechctl.options.from_settings import Spelled

Config = Annotated[
    Path | None, typer.Option("--config", help="YAML settings; everything has a default.", show_default=False)
]
Model = Annotated[
    str | None,
    typer.Option("--model", help="Model folder or Hugging Face id; else the settings'.", show_default=False),
]
Artifacts = Annotated[
    Path | None,
    typer.Option(
        "--artifacts", help="Folder of dictionaries and adapters; else the settings'.", show_default=False
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data-folder", help="Where the paths of --data lie, if not beside it.", show_default=False
    ),
]
MeasuredText = Annotated[
    Path | None,
    typer.Option("--text", help="Text to measure on besides; never trained on.", show_default=False),
]
MeasuredTokens = Annotated[int, typer.Option(help="Held-out tokens to measure on, and as many of --text.")]
SUITE_FILES = Spelled(variable="INTERPRETOPS_DATA")
"""Of the field that says where the files of suites lie."""
