"""Loads the settings: a YAML file, over it `INTERPRETOPS_…` variables, over those command-line flags."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from interpretops.errors import ConfigError
from interpretops.files.strict_yaml import read_yaml, show_path
from interpretops.settings.environment import CONFIG_VARIABLE, read_environment
from interpretops.settings.schema import Settings
from interpretops.settings.section import Section

COMMAND_LINE = "command line"
NO_EFFECT_YET: Mapping[str, str] = {
    "store.postgres_dsn": "records stay in files on this machine",
    "store.s3_bucket": "artifacts are read from paths.artifacts",
}
"""Settings that are accepted and that nothing reads, with what happens instead."""
_log = logging.getLogger(__name__)


def load_settings(
    path: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Settings:
    """The settings of this process.

    path       a YAML file; without one the file that INTERPRETOPS_CONFIG names, else none
    overrides  values of command-line flags by dotted field, as `{"gateway.port": 8000}`; None is "not given"
    environ    the environment, this process's own by default; `INTERPRETOPS_GATEWAY_PORT=8000` sets
               `gateway.port`; lists are written as YAML: `INTERPRETOPS_ENGINE_EXTRA_ARGS='[--seed=1]'`;
               a variable of this prefix that sets nothing is refused

    Relative paths in the file are relative to the file's folder, elsewhere to the working directory. What is
    set and has no effect yet is told in a warning.
    Raises `ConfigError` with one line per fault: source, field, value, what would be right.
    """
    return load_with_sources(path, overrides, environ)[0]


def load_with_sources(
    path: Path | None = None,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> tuple[Settings, dict[tuple[str, ...], str]]:
    """As `load_settings`, with where each field that is set was set: `file:line`, variable, command line."""
    environ = os.environ if environ is None else environ
    if path is None and environ.get(CONFIG_VARIABLE):
        path = Path(environ[CONFIG_VARIABLE])
    values: dict[str, Any] = {}
    lines: dict[tuple[str, ...], str] = {}
    if path is not None:
        values, lines = _from_file(path)
    sources: dict[tuple[str, ...], str] = {}
    for where, (variable, value) in read_environment(environ).items():
        _put(values, sources, where, value, variable)
    for dotted, value in (overrides or {}).items():
        if value is not None:
            _put(values, sources, tuple(dotted.split(".")), _plain(value), COMMAND_LINE)
    try:
        # Through JSON, where strict mode still turns text into paths and lists into tuples.
        settings = Settings.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources, str(path or "settings"))) from None
    for dotted, instead in NO_EFFECT_YET.items():
        section, field = dotted.split(".")
        if getattr(getattr(settings, section), field) is not None:
            source = sources.get((section, field), path)
            _log.warning("%s: %s is set, but has no effect yet: %s", source, dotted, instead)
    return settings, {**lines, **sources}


def _from_file(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The sections of a file, and of each of their fields the place: `<file>:<line>`."""
    path = path.expanduser()
    document = read_yaml(path, ConfigError)
    values = document.data
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds a {type(values).__name__}, but sections are expected: gateway: …")
    # A section whose every line is commented out is an absent one.
    values = {name: value for name, value in values.items() if value is not None}
    _anchor_paths(values, path.resolve().parent)
    lines = {tuple(map(str, where)): f"{path}:{line}" for where, line in document.lines.items()}
    return values, lines


def _anchor_paths(values: dict[str, Any], folder: Path) -> None:
    """Make the relative paths of a file relative to its folder, a model written as `./folder` included."""
    for section, field in (
        ("cache", "dir"),
        ("paths", "policies"),
        ("paths", "artifacts"),
        ("paths", "plans"),
        ("paths", "keys"),
        ("paths", "state"),
        ("paths", "transcripts"),
        ("gateway", "tls_cert"),
        ("gateway", "tls_key"),
        ("gateway", "admin_tls_cert"),
        ("gateway", "admin_tls_key"),
        ("audit", "path"),
        ("canary", "suite"),
    ):
        part = values.get(section)
        if isinstance(part, dict) and isinstance(part.get(field), str):
            part[field] = str(folder / Path(part[field]).expanduser())
    model = values.get("model")
    name = model.get("name") if isinstance(model, dict) else None
    if isinstance(model, dict) and isinstance(name, str) and name.startswith(("./", "../")):
        model["name"] = str(folder / name)


def _put(
    values: dict[str, Any],
    sources: dict[tuple[str, ...], str],
    where: tuple[str, ...],
    value: Any,
    source: str,
) -> None:
    *parents, last = where
    part = values
    for name in parents:
        inner = part.get(name)
        if not isinstance(inner, dict):
            inner = {}
            part[name] = inner
        part = inner
    part[last] = value
    sources[where] = source


def _plain(value: object) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    return list(value) if isinstance(value, tuple) else value


_SECRET_FIELDS = frozenset({("store", "postgres_dsn"), ("limits", "redis_url")})


def _explain(error: ValidationError, sources: Mapping[tuple[str, ...], str], default_source: str) -> str:
    lines = []
    for fault in error.errors(include_url=False):
        where = tuple(str(part) for part in fault["loc"])
        source = next(
            (sources[where[:n]] for n in range(len(where), 0, -1) if where[:n] in sources), default_source
        )
        field = show_path(fault["loc"])
        if fault["type"] == "extra_forbidden":
            lines.append(f"{source}: {field} is not a setting; {_known(where[:-1])}")
        elif fault["type"] == "value_error":
            # Raised by a check over a whole section: its message already names field and value.
            place = f"{field}: " if fault["loc"] else ""
            lines.append(f"{source}: {place}{fault['ctx']['error']}")
        elif fault["type"] == "string_pattern_mismatch":
            field_info = _field(where)
            meant = field_info.description if field_info else None
            lines.append(
                f"{source}: {field} = {_short(fault['input'])}, but expected is: {meant or fault['msg']}"
            )
        elif fault["type"] == "missing":
            lines.append(f"{source}: {field} is missing; give it")
        else:
            hidden = where in _SECRET_FIELDS or where[:2] == ("engine", "environment")
            shown = "(hidden)" if hidden else _short(fault["input"])
            message = fault["msg"][0].lower() + fault["msg"][1:]
            lines.append(f"{source}: {field} = {shown}, but {message.replace('input should', 'it should')}")
    return "\n".join(dict.fromkeys(lines))


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "…"


def _known(parents: tuple[str, ...]) -> str:
    """The field names that stand where an unknown one was written."""
    field = _field(parents)
    kind = Settings if not parents else None if field is None else field.annotation
    if isinstance(kind, type) and issubclass(kind, Section):
        return f"known here: {', '.join(kind.model_fields)}"
    return "docs/configuration.md lists what is"


def _field(where: tuple[str, ...]) -> FieldInfo | None:
    """The declaration of a field of a section, or None for anything deeper."""
    kind: Any = Settings
    field: FieldInfo | None = None
    for name in where:
        field = kind.model_fields.get(name) if isinstance(kind, type) and issubclass(kind, Section) else None
        kind = None if field is None else field.annotation
    return field
