"""Options that several commands of `mechctl` share, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

from mechctl.options.from_settings import Spelled

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file (YAML); everything has a default.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model", help="Model folder or Hugging Face id; overrides the settings.", show_default=False
    ),
]
Artifacts = Annotated[
    Path | None,
    typer.Option(
        "--artifacts", help="Folder of dictionaries and adapters; overrides the settings.", show_default=False
    ),
]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data-folder", help="Folder of the files that --data lists, if not its own.", show_default=False
    ),
]
MeasuredText = Annotated[
    Path | None,
    typer.Option("--text", help="Further text to measure on; never trained on.", show_default=False),
]
MeasuredTokens = Annotated[
    int, typer.Option(help="Number of held-out tokens to measure on, and of tokens of --text.")
]
SUITE_FILES = Spelled(variable="INTERPRETOPS_DATA")
"""For the field that names the folder of suite files."""
