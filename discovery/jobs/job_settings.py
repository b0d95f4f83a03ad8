"""What the settings of all offline jobs share: strict validation, with each fault in one line.

A job's settings are a frozen pydantic dataclass, the only place for defaults, ranges and meanings; `mechctl`
makes its options from it. They do not import torch, so that `mechctl --help` is fast.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from pydantic import ConfigDict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

STRICT: Final = ConfigDict(use_attribute_docstrings=True, extra="forbid")
"""For each class of settings: `@dataclass(frozen=True, config=STRICT)`."""
_BOUNDS: Final = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


@dataclass(frozen=True)
class Fault:
    """An invalid value of a setting."""

    field: str
    """The field's name; nested fields are named with dots."""
    value: Any
    right: str
    """What would be valid, as the end of a sentence: "at least 8". Other fields are in backquotes."""

    def line(self, names: Mapping[str, str] = MappingProxyType({}), shown: str | None = None) -> str:
        """The fault in one line.

        names  what the user calls a field, if not by its name
        shown  the value as the user wrote it
        """
        value = "is not given" if self.value is None else f"= {repr(self.value) if shown is None else shown}"
        right = re.sub(r"`(\w+)`", lambda found: names.get(found[1], found[1]), self.right)
        return f"{names.get(self.field, self.field)} {value}, but must be {right}"


def out_of_range(field: str, value: object, right: str) -> PydanticCustomError:
    """The error for a validator to raise if ``field`` does not fit other fields; see `Fault`."""
    context = {"field": field, "value": value, "right": right, "line": Fault(field, value, right).line()}
    return PydanticCustomError("out_of_range", "{line}", context)


def faults(error: ValidationError) -> list[Fault]:
    """All faults of the settings."""
    return [_fault(item) for item in error.errors(include_url=False)]


def _fault(item: ErrorDetails) -> Fault:
    context, kind = item.get("ctx", {}), item["type"]
    # Of a list, the invalid value is shown, without its index.
    field = ".".join(part for part in item["loc"] if isinstance(part, str))
    if kind == "out_of_range":
        return Fault(context["field"], context["value"], context["right"])
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        right = f"{words} {context[key]:g}"
    elif kind == "literal_error":
        right = "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    elif kind == "too_short":
        right = f"at least {context['min_length']} value"
    elif kind.startswith("int_"):
        right = "a whole number"
    elif kind.startswith("float_"):
        right = "a number"
    else:
        message = item["msg"]
        right = message.removeprefix("Input should be ").removeprefix("Input should ")
    return Fault(field, item["input"], right)
