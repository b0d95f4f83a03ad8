"""A field that a user can write and that nothing reads is a promise nobody keeps: there is none."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import get_annotations
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from interpretops.policy import Policy
from interpretops.settings import NO_EFFECT_YET
from interpretops.settings.schema import Settings

ROOT = Path(__file__).resolve().parents[2]
CHECKS = frozenset({"model_validator", "field_validator"})


@dataclass
class Source:
    """What one file of the product reads and names."""

    classes: frozenset[str]
    """Classes that it declares."""
    named: frozenset[str]
    """Every name that it uses."""
    reads: list[tuple[str, str]] = field(default_factory=list)
    """(receiver, attribute) of each attribute that is read outside of a validator: `gateway.port`."""
    texts: frozenset[str] = frozenset()
    """Its string constants, where it calls `getattr` with a name that it does not spell out."""


def sources() -> list[Source]:
    """All packages of the product, whatever they are called; no tests, no benchmarks."""
    packages = [folder.parent for folder in ROOT.glob("*/__init__.py")]
    packages = [folder for folder in packages if folder.name not in ("tests", "benchmarks")]
    assert {"interpretops", "proxy", "discovery", "steering_kernels"} <= {folder.name for folder in packages}
    return [read(path.read_text(encoding="utf-8")) for folder in packages for path in folder.rglob("*.py")]


def read(text: str) -> Source:
    """One file."""
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    checks = {
        inner
        for node in nodes
        if isinstance(node, ast.FunctionDef) and any(_names(part) & CHECKS for part in node.decorator_list)
        for inner in ast.walk(node)
    }
    known_as: dict[str, set[str]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign):
            for target, value in _assigned(node):
                known_as.setdefault(target, set()).add(value)
    reads = [
        (receiver, node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node not in checks
        for receiver in {_last_name(node.value), *known_as.get(_last_name(node.value), ())}
    ]
    by_name = any(
        isinstance(node, ast.Call)
        and _last_name(node.func) == "getattr"
        and not isinstance(node.args[1], ast.Constant)
        for node in nodes
    )
    texts = (node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return Source(
        frozenset(node.name for node in nodes if isinstance(node, ast.ClassDef)),
        frozenset().union(*(_names(node) for node in nodes)),
        reads,
        frozenset(texts) if by_name else frozenset(),
    )


def _assigned(node: ast.Assign) -> Iterator[tuple[str, str]]:
    """(`limits`, `gateway`) of `limits = settings.gateway`."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(target.elts, node.value.elts, strict=False))
        else:
            pairs = [(target, node.value)]
        yield from ((_last_name(left), _last_name(right)) for left, right in pairs)


def _names(node: ast.AST) -> frozenset[str]:
    if isinstance(node, ast.Call):
        return _names(node.func)
    if isinstance(node, ast.Name):
        return frozenset({node.id})
    if isinstance(node, ast.ImportFrom):
        return frozenset(alias.name for alias in node.names)
    return frozenset()


def _last_name(node: ast.expr) -> str:
    """`port` is read of `gateway` in `self._settings.gateway.port`."""
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    return _last_name(node.func) if isinstance(node, ast.Call) else ""


def fields_of(model: type[BaseModel]) -> dict[tuple[type[BaseModel], str], frozenset[str]]:
    """Every (class, field) below a schema, with the names under which an instance of the class is reached."""
    reached: dict[type[BaseModel], set[str]] = {model: {model.__name__.lower()}}
    waiting = [model]
    while waiting:
        for name, info in waiting.pop().model_fields.items():
            for kind in _models(info.annotation):
                if kind not in reached:
                    waiting.append(kind)
                reached.setdefault(kind, set()).update({name, name.removesuffix("s"), _snake(kind.__name__)})
    return {(kind, name): frozenset(names) for kind, names in reached.items() for name in kind.model_fields}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def is_read(kind: type[BaseModel], name: str, reached_as: frozenset[str], files: list[Source]) -> bool:
    """Whether a file reads the field of something called as the class is, or where it names the class."""
    declaring = {part.__name__ for part in kind.__mro__ if name in get_annotations(part)}
    family = {kind.__name__} | declaring
    for file in files:
        own = bool(family & (file.classes | file.named))
        for receiver, attribute in file.reads:
            if attribute == name and (receiver in reached_as or (own and receiver not in ("", "cls"))):
                return True
        if own and name in file.texts:
            return True
    return False


@pytest.mark.parametrize("model", [Settings, Policy])
def test_every_field_is_read_or_said_to_have_no_effect(model: type[BaseModel]) -> None:
    """The fields of both schemas are read somewhere; those of which we say that nothing does are the rest."""
    files = sources()
    unread = {
        f"{_snake(kind.__name__.removesuffix('Settings'))}.{name}"
        for (kind, name), reached_as in fields_of(model).items()
        if not is_read(kind, name, reached_as, files)
    }
    assert unread == (set(NO_EFFECT_YET) if model is Settings else set())


def test_walk_finds_a_field_that_nothing_reads() -> None:
    """A field that only its own validator looks at counts as unread, one that a property uses as read."""

    class Part(BaseModel):
        used: int
        unused: int
        checked: int

    class Whole(BaseModel):
        part: Part

    text = """
class Part:
    @model_validator(mode="after")
    def _check(self):
        return self.checked
    @property
    def twice(self):
        return 2 * self.used
"""
    elsewhere = read(
        "def f(whole):\n    whole.part.unused_too\n    thing.unused\n    whole.part.unused = 1\n"
    )
    through = read("def f(whole):\n    one, short = 1, whole.part\n    return short.unused\n")

    def found(*files: Source) -> set[str]:
        return {
            name
            for (kind, name), reached_as in fields_of(Whole).items()
            if is_read(kind, name, reached_as, list(files))
        }

    assert found(read(text), elsewhere) == {"part", "used"}
    assert found(read(text), through) == {"part", "used", "unused"}
