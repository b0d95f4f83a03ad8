"""Reads settings from `INTERPRETOPS_…` variables, and refuses those that set nothing."""

import difflib
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from interpretops.errors import ConfigError
from interpretops.files.strict_yaml import parse_yaml
from interpretops.settings.schema import Settings
from interpretops.settings.section import Section

ENV_PREFIX: Final = "INTERPRETOPS_"
CONFIG_VARIABLE: Final = "INTERPRETOPS_CONFIG"
NOT_SETTINGS: Final = frozenset({CONFIG_VARIABLE, "INTERPRETOPS_DATA"})
"""Variables of ours that set no field: the settings file, and the folder of public data (`mechctl eval`)."""
_SERVICE = re.compile(r"_(SERVICE_(HOST|PORT)|PORT|PORT_\d+_(TCP|UDP))(_[A-Z0-9_]+)?$")
_KUBERNETES: Final = (
    " (Kubernetes sets such variables for a Service of that name; `enableServiceLinks: false` in the pod "
    "stops it)"
)


def read_environment(environ: Mapping[str, str]) -> dict[tuple[str, ...], tuple[str, Any]]:
    """`{field: (variable, value)}`, a field as its path. Raises `ConfigError`, one line per variable."""
    known = _variables()
    found: dict[tuple[str, ...], tuple[str, Any]] = {}
    faults: list[str] = []
    for variable, text in sorted(environ.items()):
        if variable in NOT_SETTINGS or not variable.upper().startswith(ENV_PREFIX):
            continue
        if variable in known:
            where, info = known[variable]
            found[where] = variable, _parse(text, info, variable)
        else:
            faults.append(f"{variable}: {_why_unknown(variable)}")
    if faults:
        raise ConfigError("\n".join(faults))
    return found


@cache
def _variables() -> dict[str, tuple[tuple[str, ...], FieldInfo]]:
    """Every variable that sets something, and the field that it sets."""
    found: dict[str, tuple[tuple[str, ...], FieldInfo]] = {}
    for section, info in Settings.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            for field, inner in kind.model_fields.items():
                found[f"{ENV_PREFIX}{section}_{field}".upper()] = (section, field), inner
        else:
            found[f"{ENV_PREFIX}{section}".upper()] = (section,), info
    return found


def _why_unknown(variable: str) -> str:
    """What is wrong with a variable, and what was most likely meant. Its value may be a secret."""
    known, upper = (*_variables(), *NOT_SETTINGS), variable.upper()
    if upper in known:
        return f"variables are written in capitals; write {upper}"
    section, _, field = upper.removeprefix(ENV_PREFIX).lower().partition("_")
    whole = f"{ENV_PREFIX}{section.upper()}"
    if whole in known:
        return f"{section} is set as a whole; write all of it as YAML in {whole}"
    if section not in Settings.model_fields:
        what = f"the settings have no section {section!r}"
    elif field:
        what = f"{section}.{field} is not a setting"
    else:
        what = f"{section} is a section; each of its fields has a variable of its own"
    short = {name.removeprefix(ENV_PREFIX): name for name in known}
    written = upper.removeprefix(ENV_PREFIX)
    near = [name for name in known if written and name.endswith(f"_{written}")]
    near = near or [short[name] for name in difflib.get_close_matches(written, short, n=1, cutoff=0.7)]
    meant = f"did you mean {' or '.join(near)}?" if near else "docs/configuration.md lists what can be set"
    meant += "; a variable of another program is to be unset here"
    return f"{what}; {meant}{_KUBERNETES if _SERVICE.search(upper) else ''}"


def _parse(text: str, field: FieldInfo, variable: str) -> Any:
    """The text itself where the field takes text, else the YAML value it spells."""
    kind: Any = field.annotation
    try:
        TypeAdapter(kind).validate_json(json.dumps(text), strict=True)
    except ValidationError:
        return parse_yaml(text.encode(), ConfigError, variable).data
    return text
