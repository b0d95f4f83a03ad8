"""Options made from a model: how each kind of field is spelled, read, shown and refused."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
import typer
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from discovery.jobs.job_settings import STRICT, out_of_range
from mechctl import main
from mechctl.options.from_settings import LeftOut, Options, Spelled, options_from_models


@dataclass(frozen=True, config=STRICT)
class Inner:
    """Fields inside another model."""

    share: float = Field(default=0.5, ge=0, le=1)
    """A share."""


@dataclass(frozen=True, config=STRICT)
class Model:
    """Every kind of field that the jobs have."""

    where: Path
    """Where it lies."""
    count: int = Field(default=3, ge=1)
    """How many. Not shown in the help."""
    kind: Literal["one", "two"] = "one"
    """The kind."""
    layers: tuple[int, ...] = (1, 2)
    """Layers."""
    strengths: tuple[float, ...] | None = None
    """Strengths."""
    words: tuple[str, ...] = ()
    """Words."""
    weights: tuple[tuple[str, float], ...] = ()
    """Weights."""
    quick: bool = False
    """Be quick."""
    cache: bool | None = None
    """With a cache."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """A limit."""
    inner: Inner = Field(default_factory=Inner)
    hidden: int = 7
    """Not an option."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.count == 13:
            raise out_of_range("count", self.count, f"another, as `where` is {self.where} and `x` unknown")
        return self


@dataclass(frozen=True, config=STRICT)
class Other:
    """Another model of the same command."""

    count: int = 3
    """How many of these."""
    size: int = Field(default=9, ge=5)
    """How large."""


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command with options from both models as `mechctl` does; it prints what it was given."""
    app = typer.Typer(rich_markup_mode=None)

    @app.command()
    @options_from_models
    def command(
        *,
        own: str = "mine",
        chosen: Annotated[
            Model,
            Options(
                {
                    "where": "--in",
                    "layers": Spelled(("--layers", "-l"), default="some"),
                    "inner.share": "--inner-share",
                },
                without=("hidden",),
            ),
        ],
        other: Annotated[Other, Options()],
        fill: bool = False,
        left_out: LeftOut,
    ) -> None:
        """Prints."""
        print(own, replace(chosen, count=0) if fill else chosen, other, sorted(left_out), sep="\n")

    monkeypatch.setattr(main, "app", app)

    def start(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mechctl", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return start


def test_omitted_option_keeps_the_models_default(run: Run) -> None:
    """The function receives both models, its own parameters, and which options were left out."""
    status, out, _ = run("--in", "here")
    left_out = ["cache", "layers", "limit", "strengths", "weights", "words"]
    assert status == 0
    assert out == f"mine\n{Model(Path('here'))}\n{Other()}\n{left_out}\n"


def test_every_kind_of_field_is_read(run: Run) -> None:
    """Numbers with commas, repeated words, names with numbers, flags, both ways of a switch, inner fields."""
    status, out, err = run(
        *("--in", "here", "--count", "5", "--kind", "two", "-l", "8,15", "--strengths", "0.5,2"),
        *("--words", "a", "--words", "b,c", "--weights", "x=2", "--weights", "y=0.5"),
        *("--quick", "--no-cache", "--limit", "9", "--inner-share", "1", "--own", "yours"),
    )
    expected = Model(
        where=Path("here"),
        count=5,
        kind="two",
        layers=(8, 15),
        strengths=(0.5, 2.0),
        words=("a", "b,c"),
        weights=(("x", 2.0), ("y", 0.5)),
        quick=True,
        cache=False,
        limit=9,
        inner=Inner(share=1.0),
    )
    assert status == 0, err
    assert out == f"yours\n{expected}\n{Other(count=5)}\n[]\n"


def test_help_is_the_first_sentence_of_the_docstring(run: Run) -> None:
    """Choices the least value and that it may be repeated are added; what must be given comes first."""
    status, out, _ = run("--help")
    text = " ".join(out.split())
    assert status == 0
    assert "How many. [default: 3]" in text
    assert "Not shown" not in text
    assert "--hidden" not in text
    assert "The kind: one or two. [default: one]" in text
    assert "Words. May be repeated." in text
    assert "N,N,... Layers. [default: (some)]" in text
    assert "--quick Be quick." in text
    assert "--cache / --no-cache With a cache." in text
    assert "How large. At least 5." in text
    assert text.index("--in ") < text.index("--own")
    assert "[required]" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--count", "0"), "--count = 0, but must be at least 1"),
        (("--kind", "ten"), "--kind = 'ten', but must be one of one, two"),
        (("--limit", "0"), "--limit = 0, but must be at least 1"),
        (("--inner-share", "2"), "--inner-share = 2.0, but must be at most 1"),
        (("--layers", "8;9"), "--layers = '8;9', but must be numbers separated by commas, such as 8,15"),
        (("--strengths", "x"), "--strengths = 'x', but must be numbers separated by commas, such as 0.5,2"),
        (("--weights", "x"), "--weights = 'x', but must be a name and a number, such as x=2"),
        (("--count", "13"), "--count = 13, but must be another, as --in is here and x unknown"),
        (("--fill",), "--count = 0, but must be at least 1"),
    ],
)
def test_refused_value_is_one_line_that_names_the_option(
    run: Run, arguments: tuple[str, ...], line: str
) -> None:
    """The line shows the value as typed and what would be valid, also if the job filled it in."""
    status, out, err = run("--in", "here", *arguments)
    assert (status, out, err) == (2, "", f"{line}\n")


def test_two_faults_are_two_lines(run: Run) -> None:
    """Each invalid option has its own line, whichever model it belongs to."""
    _, _, err = run("--in", "here", "--count", "0", "--kind", "ten", "--size", "1")
    assert [line.split()[0] for line in err.splitlines()] == ["--count", "--kind", "--size"]


def test_spelling_of_an_unknown_field_fails_at_declaration() -> None:
    """A field that was renamed does not silently lose its spelling, nor does a hidden one appear."""

    def command(*, chosen: Annotated[Other, Options({"amount": "--count"}, without=("volume",))]) -> None: ...

    with pytest.raises(AssertionError, match="command: Other has no amount, volume"):
        options_from_models(command)


def test_shared_option_with_two_defaults_fails_at_declaration() -> None:
    """Two models may share an option only when both have the same default, and none is the command's own."""

    def models(
        *,
        chosen: Annotated[Other, Options({"size": "--amount"})],
        other: Annotated[Other, Options({"count": "--amount"}, without=("size",))],
    ) -> None: ...

    def own(*, chosen: Annotated[Other, Options()], count: int = 3) -> None: ...

    with pytest.raises(AssertionError, match="models: --amount is declared twice"):
        options_from_models(models)
    with pytest.raises(AssertionError, match="own: --count is declared twice"):
        options_from_models(own)
