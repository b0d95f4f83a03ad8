"""Safe, bounded YAML: plain values with their line numbers; no aliases, tags or duplicate keys."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from interpretops.errors import InterpretOpsError
from interpretops.files.regular_file import read_regular

MAX_BYTES = 2**20
MAX_DEPTH = 16

KeyPath = tuple[str | int, ...]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(
    r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)


@dataclass(frozen=True)
class Document:
    """One YAML document and the line on which each of its values begins."""

    source: str
    """The file name shown in errors."""
    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """`` (line N)`` of a value or of its nearest existing parent; empty if there is none."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f" (line {self.lines[path[:end]]})"
        return ""


def show_path(path: KeyPath) -> str:
    """``("interventions", 2, "selector")`` as ``interventions[2].selector``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the document"


def read_yaml(path: Path, error: type[InterpretOpsError], source: str | None = None) -> Document:
    """Read a file of at most 1 MiB; raises ``error`` with one line naming the file, and line or field."""
    source = str(path) if source is None else source
    try:
        data = read_regular(path, MAX_BYTES)
    except OSError as problem:
        raise error(f"{source}: cannot be read ({problem.strerror or problem})") from problem
    if len(data) > MAX_BYTES:
        raise error(f"{source}: is larger than the limit of {MAX_BYTES} bytes")
    return parse_yaml(data, error, source)


def parse_yaml(data: bytes, error: type[InterpretOpsError], source: str = "<yaml>") -> Document:
    """Parse one document of YAML 1.2's core types; refuses aliases, anchors, tags and duplicate keys."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(f"{source}: is not UTF-8 (byte {problem.start})") from problem
    lines: dict[KeyPath, int] = {}
    try:
        builder = _Builder(iter(yaml.parse(text, Loader=_LOADER)), error, source, lines)
        return Document(source, builder.document(), lines)
    except yaml.YAMLError as problem:
        mark = getattr(problem, "problem_mark", None)
        place = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        reason = getattr(problem, "problem", None) or str(problem).splitlines()[0]
        raise error(f"{source}: not valid YAML: {reason}{place}") from problem


class _Builder:
    """Builds plain values directly from parser events, so that limits apply before anything is expanded."""

    def __init__(
        self, events: Iterator[Any], error: type[InterpretOpsError], source: str, lines: dict[KeyPath, int]
    ) -> None:
        self._events, self._error, self._source, self._lines = events, error, source, lines

    def document(self) -> Any:
        next(self._events)  # the stream's beginning
        if isinstance(next(self._events), yaml.StreamEndEvent):
            raise self._error(f"{self._source}: is empty")
        value = self._value(next(self._events), ())
        next(self._events)  # the document's end
        if not isinstance(next(self._events), yaml.StreamEndEvent):
            raise self._error(f"{self._source}: holds more than one document (a second `---`)")
        return value

    def _fail(self, event: Any, path: KeyPath, message: str) -> InterpretOpsError:
        return self._error(f"{self._source}: {show_path(path)} {message} (line {_line(event)})")

    def _value(self, event: Any, path: KeyPath) -> Any:
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._fail(event, path, "uses a YAML anchor or alias; write the value out")
        if event.tag is not None and not (isinstance(event, yaml.ScalarEvent) and event.tag == "!"):
            raise self._fail(event, path, f"has the YAML tag {event.tag!r}; tags are not allowed")
        if len(path) > MAX_DEPTH:
            raise self._fail(event, path[:4], f"is nested more than {MAX_DEPTH} levels deep")
        self._lines[path] = _line(event)
        if isinstance(event, yaml.ScalarEvent):
            return _resolve(event.value) if event.implicit[0] else event.value
        return self._sequence(path) if isinstance(event, yaml.SequenceStartEvent) else self._mapping(path)

    def _sequence(self, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._value(event, (*path, len(items))))
        return items

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.anchor is not None or event.tag is not None:
                raise self._fail(event, path, "has a key that is not a plain word")
            key = event.value
            if key in items:
                raise self._fail(event, (*path, key), "is given twice; keep one")
            items[key] = None
            items[key] = self._value(next(self._events), (*path, key))
            self._lines[(*path, key)] = _line(event)
        return items


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _resolve(text: str) -> Any:
    """A plain scalar by YAML 1.2's core schema: no yes/no booleans, octals, dates or sexagesimals."""
    if text in _NULL:
        return None
    if text in _TRUE or text in _FALSE:
        return text in _TRUE
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text
