"""The configuration page, written from the settings' schema, so that it says what the code does."""

import json
import sys
from collections.abc import Iterator
from typing import Any

from pydantic.fields import FieldInfo

from interpretops.settings import ENV_PREFIX
from interpretops.settings.access import Alias, Binding, KeptRequests, Limits, Match, Tenant
from interpretops.settings.schema import Settings
from interpretops.settings.section import Section

_LISTS: dict[str, tuple[type[Section], ...]] = {
    "tenants": (Tenant, Limits, KeptRequests),
    "aliases": (Alias,),
    "bindings": (Binding, Match),
}
"""Settings that are lists, and what their items consist of."""

_INTRODUCTION = """\
# Configuration

<!-- Written by `make docs`; do not edit. -->

Every command reads the same settings, and every setting has a default: no file is needed.
A value is taken from the command line, else from the environment, else from the file given with `--config`
(or named by `INTERPRETOPS_CONFIG`), else from the default.

```yaml
model:
  name: HuggingFaceTB/SmolLM2-360M-Instruct
gateway:
  port: 9000
bindings:
  - policy: refuse-harmful        # for everybody, whatever they ask for
    mode: mandatory
```

In the environment a field is written `INTERPRETOPS_<SECTION>_<FIELD>`, as `INTERPRETOPS_GATEWAY_PORT=9000`;
lists as YAML. Unknown keys, values of another type and values out of range stop the start, with source,
field and value; so does a variable of this prefix that sets nothing. `INTERPRETOPS_CONFIG` and
`INTERPRETOPS_DATA`, the folder of public data for `mechctl eval`, are the two others that are known.
Relative paths in a file are relative to that file, all others to the working directory.
"""


def settings_reference() -> str:
    """The page as Markdown."""
    parts = [_INTRODUCTION]
    for name, field in Settings.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            parts += _table(f"`{name}`", kind, f"{ENV_PREFIX}{name.upper()}_…")
    for name, sections in _LISTS.items():
        parts += [f"## `{name}`\n", f"{Settings.model_fields[name].description}\n", "A list; each item:\n"]
        for section in sections:
            parts += _table(section.__name__, section)
    return "\n".join(parts).rstrip() + "\n"


def _table(title: str, section: type[Section], variable: str | None = None) -> Iterator[str]:
    yield f"{'##' if variable else '###'} {title}\n"
    yield f"{section.__doc__}{f' Environment: `{variable}`.' if variable else ''}\n"
    yield "| key | default | meaning |"
    yield "|---|---|---|"
    for key, field in section.model_fields.items():
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        yield f"| `{key}` | {_default(field)} | {meaning} |"
    yield ""


def _default(field: FieldInfo) -> str:
    """The default as one would write it; nothing where there is none or where the description gives it."""
    if field.is_required():
        return "required"
    value: Any = field.default
    if field.default_factory is not None or value is None:
        return ""
    return f"`{json.dumps(value)}`"


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
