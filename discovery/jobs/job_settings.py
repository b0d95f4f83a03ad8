"""What the settings of all offline jobs share: they are strict, and each fault of theirs is one line.

A job's settings are a frozen pydantic dataclass: defaults, ranges and meanings stand there and nowhere else,
and `mechctl` makes its options from it. They import no torch, so that `mechctl --help` does not.
"""

from dataclasses import dataclass
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
    """A value that settings refuse."""

    field: str
    """The field's name, with dots to one inside another."""
    value: Any
    right: str
    """What would be right, as the end of a sentence: "at least 8"."""

    def line(self, name: str | None = None, shown: str | None = None) -> str:
        """The fault in a line; ``name`` and ``shown`` are what the user wrote, if not field and value."""
        value = repr(self.value) if shown is None else shown
        return f"{name or self.field} = {value}, but must be {self.right}"


def out_of_range(field: str, value: object, right: str) -> PydanticCustomError:
    """For a validator to raise when ``value`` of ``field`` does not go with the other fields."""
    return PydanticCustomError(
        "out_of_range",
        "{field} = {shown}, but must be {right}",
        {"field": field, "value": value, "shown": repr(value), "right": right},
    )


def faults(error: ValidationError) -> list[Fault]:
    """All that is wrong with some settings."""
    return [_fault(item) for item in error.errors(include_url=False)]


def _fault(item: ErrorDetails) -> Fault:
    context, kind = item.get("ctx", {}), item["type"]
    field = ".".join(map(str, item["loc"]))
    if kind == "out_of_range":
        return Fault(context["field"], context["value"], context["right"])
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        right = f"{words} {context[key]:g}"
    elif kind == "literal_error":
        right = "one of " + context["expected"].replace("'", "").replace(" or ", ", ")
    elif kind.startswith("int_"):
        right = "a whole number"
    elif kind.startswith("float_"):
        right = "a number"
    else:
        message = item["msg"]
        right = message.removeprefix("Input should be ").removeprefix("Input should ")
    return Fault(field, item["input"], right)
