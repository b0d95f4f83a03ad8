"""The settings in force, each with where it comes from: a default, a line of a file, a variable, a flag."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from interpretops.settings.load import load_with_sources

DEFAULT = "default"


@dataclass(frozen=True)
class Effective:
    """One setting as every command sees it."""

    field: str
    """Dotted, as it is written in messages: `gateway.port`."""
    value: Any
    """As JSON; secrets are hidden."""
    source: str
    """`default`, `<file>:<line>`, the name of a variable, or `command line`."""


def effective_settings(
    path: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> list[Effective]:
    """All settings in the order of their declaration; arguments and errors as of `load_settings`."""
    settings, sources = load_with_sources(path, overrides, environ)
    values = settings.model_dump(mode="json")
    return [
        Effective(".".join(where), _shown(where, value), sources.get(where, DEFAULT))
        for where, value in _fields(settings, values, ())
    ]


def _shown(where: tuple[str, ...], value: Any) -> Any:
    """What may be shown: variables of the engine may hold secrets, so their names only."""
    if where == ("engine", "environment"):
        return dict.fromkeys(value, "(hidden)")
    return value


def _fields(
    section: BaseModel, values: Mapping[str, Any], above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name in type(section).model_fields:
        part = getattr(section, name)
        if isinstance(part, BaseModel) and not above:
            yield from _fields(part, values[name], (name,))
        else:
            yield (*above, name), values[name]
