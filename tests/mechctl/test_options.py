"""The options of every command: scripts depend on names and defaults, so no change goes unnoticed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from mechctl.main import app

LISTED = Path(__file__).with_name("options.txt")


def _commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command of `mechctl` by its words."""
    for word, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _commands(inner, f"{name} {word}".strip())
    if not hasattr(command, "commands"):
        yield name, command


def _default(parameter: Any) -> str:
    """The default as listed; an omitted repeated option has none, however it is declared."""
    value = parameter.default() if callable(parameter.default) else parameter.default
    if value is None or (parameter.multiple and not value):
        return "no default"
    return str(value.value if hasattr(value, "value") else value)


def option_lines() -> list[str]:
    """One line for each option and argument: command, spellings, default, and how it is given."""
    lines = []
    for name, command in _commands(typer.main.get_command(app)):
        for parameter in command.params:
            spelled = " ".join([*parameter.opts, *parameter.secondary_opts])
            notes = [
                "required" if parameter.required else _default(parameter),
                *(["flag"] if getattr(parameter, "is_flag", False) else []),
                *(["may be repeated"] if parameter.multiple else []),
                *([f"{parameter.nargs} values"] if parameter.nargs != 1 else []),
                *([f"or {parameter.envvar}"] if parameter.envvar else []),
            ]
            lines.append(f"{name} {spelled}: {', '.join(notes)}")
    return sorted(lines)


def test_options_of_every_command_match_the_list() -> None:
    """Names, aliases, defaults and which are required: scripts that ran before still run."""
    assert option_lines() == LISTED.read_text(encoding="utf-8").splitlines()


def test_help_of_every_command_fits_a_small_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns no name, type or default is cut off."""
    monkeypatch.setenv("COLUMNS", "80")
    for name, _ in _commands(typer.main.get_command(app)):
        shown = CliRunner().invoke(app, [*name.split(), "--help"])
        assert shown.exit_code == 0
        assert [line for line in shown.output.splitlines() if "…" in line] == [], name
