"""Makes command-line options from a job's settings, so that each is declared once, in its pydantic model.

    @options_from_models
    def trace(*, out: …, chosen: Annotated[TraceSettings, Options({"held_out_share": "--held-out"})]) -> None:

gives the command an option for every field, with the field's name, default and the first sentence of its
docstring. The function receives the model. If the model refuses a value, one line names the option.
"""

import inspect
import keyword
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic import ValidationError
from pydantic.dataclasses import is_pydantic_dataclass
from pydantic.fields import FieldInfo

from discovery.jobs.job_settings import faults
from interpretops.errors import ConfigError


@dataclass(frozen=True)
class Spelled:
    """How one field appears on the command line, if not under its own name."""

    names: tuple[str, ...] = ()
    default: str | None = None
    """Text shown as the default if the model or the command decides the value of an option that is left out.
    Empty shows none."""
    metavar: str | None = None
    variable: str | None = None
    """Environment variable that gives the value if the option is left out."""


@dataclass(frozen=True)
class Options:
    """How a model's fields become options. Nested fields are named with a dot: `budgets.benign`."""

    spelled: Mapping[str, str | Spelled] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Fields without an option: they keep their default, or the command fills them in."""
    only: tuple[str, ...] = ()
    """If given, only these fields have options."""


class LeftOut(frozenset[str]):
    """Type of the parameter that receives the paths of the fields whose options were left out.

    Only options without a value of their own count: those that show a text (`Spelled.default`) or no default.
    """


@dataclass(frozen=True)
class _Field:
    """One option, and the field that it sets."""

    path: str
    names: tuple[str, ...]
    info: FieldInfo
    kind: Any
    """The field's type without None."""
    may_be_none: bool
    spelled: Spelled

    @property
    def parameter(self) -> str:
        """The name of the function's parameter."""
        stem = self.names[0].lstrip("-").replace("-", "_")
        return f"{stem}_" if keyword.iskeyword(stem) else stem

    @property
    def repeated(self) -> bool:
        """Whether the option is repeated for each value. Numbers are separated by commas instead."""
        return get_origin(self.kind) is tuple and not self._with_commas

    @property
    def _with_commas(self) -> bool:
        return get_origin(self.kind) is tuple and self._each in (int, float)

    @property
    def _each(self) -> Any:
        """The type of each of several values."""
        inner = get_args(self.kind)[0]
        return get_args(inner)[0] if get_origin(inner) is Annotated else inner

    def declared(self) -> inspect.Parameter:
        """The option as typer declares it."""
        default: Any = self.info.get_default(call_default_factory=True)
        kind, names, metavar = self.kind, self.names, self.spelled.metavar
        shown = True if self.spelled.default is None else self.spelled.default or False
        required = self.info.is_required()
        if get_origin(kind) is Literal:
            kind = str
        elif self._with_commas:
            kind, metavar = str, metavar or "N,N,..."
            default = ",".join(f"{value:g}" for value in default) if default else None
        elif self.repeated:
            each = str if get_origin(self._each) is tuple else self._each
            kind, default = list[each], None  # type: ignore[valid-type]
            metavar = metavar or f"<{each.__name__.lower()}>"
        elif kind is bool and self.may_be_none:
            names = (f"{names[0]}/--no-{names[0].removeprefix('--')}",)
        if self.spelled.default is not None:
            default = None
        if default is None and not required:
            kind = kind | None
        option = typer.Option(
            *names,
            help=self._help(),
            metavar=metavar,
            show_default=shown,
            envvar=self.spelled.variable,
        )
        return inspect.Parameter(
            self.parameter,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if required else default,
            annotation=Annotated[kind, option],
        )

    def _help(self) -> str:
        text = " ".join((self.info.description or "").split())
        first, dot, _ = text.partition(". ")
        text = f"{first}{dot}".strip()
        if get_origin(self.kind) is Literal:
            *others, last = map(str, get_args(self.kind))
            text = f"{text.removesuffix('.')}: {', '.join(others)} or {last}."
        least = next((note.ge for note in self.info.metadata if hasattr(note, "ge")), 0)
        text += f" At least {least}." if isinstance(least, int) and least > 1 else ""
        return f"{text} May be repeated." if self.repeated else text

    def value(self, given: Any) -> Any:
        """The option's value as the model takes it. Raises `ConfigError` if it cannot be parsed."""
        if self._with_commas:
            kind = self._each
            try:
                return tuple(kind(part) for part in given.split(","))
            except ValueError:
                example = "8,15" if kind is int else "0.5,2"
                raise ConfigError(
                    f"{self.names[0]} = {given!r}, but must be numbers separated by commas, such as {example}"
                ) from None
        if self.repeated and get_origin(self._each) is tuple:
            return tuple(self._named_number(text) for text in given)
        return tuple(given) if self.repeated else given

    def _named_number(self, text: str) -> tuple[str, float]:
        name, _, number = text.partition("=")
        try:
            return name, float(number)
        except ValueError:
            raise ConfigError(
                f"{self.names[0]} = {text!r}, but must be a name and a number, such as {name or 'name'}=2"
            ) from None


def options_from_models(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with an option for each field in place of each parameter that is a model."""
    hints = get_type_hints(command, include_extras=True)
    parameters: dict[str, inspect.Parameter] = {}
    models: dict[str, tuple[Any, list[_Field]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if hints[name] is LeftOut:
            continue
        options = next((note for note in get_args(hints[name])[1:] if isinstance(note, Options)), None)
        if options is None:
            parameters[name] = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            continue
        model = get_args(hints[name])[0]
        models[name] = model, list(_fields(model, options))
        unknown = {*options.spelled, *options.without, *options.only} - set(_paths(model))
        assert not unknown, f"{command.__name__}: {model.__name__} has no {', '.join(sorted(unknown))}"
        for option in models[name][1]:
            declared = option.declared()
            # Two models may share an option: the first one declares it.
            first = parameters.setdefault(option.parameter, declared)
            alone = option.parameter not in hints and first.default == declared.default
            assert alone, f"{command.__name__}: {option.names[0]} is declared twice"

    def run(**given: Any) -> None:
        chosen: dict[str, Any] = {}
        lines: list[str] = []
        for name, (model, fields) in models.items():
            try:
                chosen[name] = _build(model, fields, given)
            except ValidationError as error:
                lines += _explain(error, fields)
            except ConfigError as error:
                lines.append(str(error))
        if lines:
            raise ConfigError("\n".join(dict.fromkeys(lines)))
        own = {name: given[name] for name in hints if name in given and name not in models}
        left_out = LeftOut(
            option.path
            for _, fields in models.values()
            for option in fields
            if given[option.parameter] is None
        )
        own |= {name: left_out for name, hint in hints.items() if hint is LeftOut}
        try:
            command(**own, **chosen)
        except ValidationError as error:
            # A job may fill in what was left out; the model then checks it again.
            of = next((fields for model, fields in models.values() if model.__name__ == error.title), None)
            if of is None:
                raise
            raise ConfigError("\n".join(_explain(error, of))) from None

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    # Required options come first in the help.
    ordered = sorted(parameters.values(), key=lambda one: one.default is not inspect.Parameter.empty)
    run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {name: parameter.annotation for name, parameter in parameters.items()}
    return run


def _fields(model: Any, options: Options, prefix: str = "") -> Iterator[_Field]:
    for name, info in model.__pydantic_fields__.items():
        path = f"{prefix}{name}"
        if path in options.without or (options.only and path not in options.only):
            continue
        if is_pydantic_dataclass(info.annotation):
            yield from _fields(info.annotation, options, f"{path}.")
            continue
        spelled = options.spelled.get(path, Spelled())
        spelled = Spelled((spelled,)) if isinstance(spelled, str) else spelled
        kind, may_be_none = _without_none(info.annotation)
        names = spelled.names or (f"--{name.replace('_', '-')}",)
        yield _Field(path, names, info, kind, may_be_none, spelled)


def _paths(model: Any, prefix: str = "") -> Iterator[str]:
    """The paths of all fields, nested ones included."""
    for name, info in model.__pydantic_fields__.items():
        yield f"{prefix}{name}"
        if is_pydantic_dataclass(info.annotation):
            yield from _paths(info.annotation, f"{prefix}{name}.")


def _without_none(kind: Any) -> tuple[Any, bool]:
    if get_origin(kind) not in (Union, UnionType):
        return kind, False
    (other,) = (part for part in get_args(kind) if part is not NoneType)
    return get_args(other)[0] if get_origin(other) is Annotated else other, True


def _build(model: Any, fields: list[_Field], given: Mapping[str, Any]) -> Any:
    """The model made from the options that were given; other fields keep their defaults."""
    values: dict[str, Any] = {}
    for option in fields:
        if (value := given[option.parameter]) is None:
            continue
        *outer, name = option.path.split(".")
        part = values
        for step in outer:
            part = part.setdefault(step, {})
        part[name] = option.value(value)
    return model(**values)


def _explain(error: ValidationError, fields: list[_Field]) -> Iterator[str]:
    names = {option.path: option.names[0] for option in fields}
    for fault in faults(error):
        yield fault.line(names, _as_typed(fault.value))


def _as_typed(value: Any) -> str:
    """A value roughly as it was typed on the command line."""
    if isinstance(value, tuple):
        return ",".join("=".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
    return str(value) if isinstance(value, Path) else repr(value)
