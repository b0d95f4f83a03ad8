"""The policy reference page, written from the schema, so that it cannot say anything else than the code."""

import json
from collections.abc import Iterator
from typing import Any

from interpretops.policy import policy_schema

_INTRODUCTION = """\
# Policy reference

<!-- Written by `mechctl policy reference`; do not edit. -->

A policy is one YAML file. Unknown keys, YAML anchors and aliases, duplicate keys, files over 1 MiB and
numbers that are not finite are refused, with file, field, value and line. `mechctl policy validate FILE`
checks a file by itself, `mechctl policy compile FILE` checks it against a model and its dictionaries, and
`mechctl policy schema` prints a JSON Schema for editors.

```yaml
meta:
  id: calm-v1
  target_class: jailbreak
gates:
  harmful:                      # a name of your own
    layer: 12
    scope: prompt_end           # read the last token of the prompt
    latched: true               # and stay open for the whole answer
    conditions:
      - probe: {file: harmful.safetensors, tensor: direction}
        threshold: 2.5
interventions:
  - type: steering_vector
    selector: {layer: 15}
    vector: {file: harmful.safetensors, tensor: refusal}
    strength: 6.0
    gate: harmful
```
"""


def policy_reference() -> str:
    """The page as Markdown."""
    schema = policy_schema()
    definitions = schema["$defs"]
    parts = [_INTRODUCTION, *_section("Policy", schema, definitions)]
    for name in _in_order(schema, definitions):
        parts += _section(name, definitions[name], definitions)
    return "\n".join(parts).rstrip() + "\n"


def _section(name: str, schema: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    kind = schema["properties"].get("type", {}).get("const")
    yield f"## {f'`{kind}`' if kind else name}\n"
    if name == "Policy":
        yield "The whole file.\n"
    yield f"{schema['description']}\n"
    required = schema.get("required", [])
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in schema["properties"].items():
        default = "required" if key in required else _default(field)
        meaning = _meaning(field, definitions).replace("|", "\\|")
        yield f"| `{key}` | {_kind(field, definitions)} | {default} | {meaning} |"
    yield ""


def _meaning(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """The field's own description; pydantic leaves it out where it is that of the field's type."""
    named = definitions.get(field.get("$ref", "").rsplit("/", 1)[-1], {})
    return " ".join(str(field.get("description", named.get("description", ""))).split())


def _default(field: dict[str, Any]) -> str:
    value = field.get("default")
    return (
        "" if value in (None, "", {}, []) else f"`{json.dumps(value)}`" if not isinstance(value, dict) else ""
    )


def _kind(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in field:
        name = field["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{_anchor(name, definitions)})"
    options = [item for item in field.get("anyOf", field.get("oneOf", [])) if item.get("type") != "null"]
    if options:
        return " or ".join(_kind(option, definitions) for option in options)
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return ", ".join(f"`{item}`" for item in field["enum"])
    if "prefixItems" in field:
        return f"[{', '.join(_kind(item, definitions) for item in field['prefixItems'])}]"
    if field.get("type") == "array":
        return f"list of {_kind(field['items'], definitions)}"
    if field.get("type") == "object":
        return f"mapping of names to {_kind(_mapped(field), definitions)}"
    return f"{field['type']}{_bounds(field)}"


def _mapped(field: dict[str, Any]) -> dict[str, Any]:
    if "patternProperties" in field:
        value: dict[str, Any] = next(iter(field["patternProperties"].values()))
        return value
    mapped: dict[str, Any] = field["additionalProperties"]
    return mapped


def _bounds(field: dict[str, Any]) -> str:
    low = field.get("minimum", field.get("exclusiveMinimum"))
    high = field.get("maximum")
    if low is None or high == -low:  # the bounds that all numbers share
        return ""
    sign = ">" if "exclusiveMinimum" in field else "≥"
    return f" {sign} {low:g}" if high in (None, 1e6) else f", {low:g} to {high:g}"


def _anchor(name: str, definitions: dict[str, Any]) -> str:
    return str(definitions[name]["properties"].get("type", {}).get("const", name.lower()))


def _in_order(schema: dict[str, Any], definitions: dict[str, Any]) -> list[str]:
    """Names of the definitions, each after the one that first mentions it."""
    order: list[str] = []
    waiting = _mentions(schema["properties"])
    while waiting:
        name = waiting.pop(0)
        if name not in order:
            order.append(name)
            waiting += _mentions(definitions[name])
    return order


def _mentions(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["$ref"].rsplit("/", 1)[-1]] if "$ref" in value else []
        return own + [
            name for key, item in value.items() if key != "discriminator" for name in _mentions(item)
        ]
    if isinstance(value, list):
        return [name for item in value for name in _mentions(item)]
    return []
