"""Reading YAML: what is refused, and that values keep YAML 1.2's meaning."""

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interpretops.errors import PolicyError
from interpretops.files.strict_yaml import MAX_BYTES, parse_yaml, read_yaml


def parse(text: str) -> object:
    return parse_yaml(text.encode(), PolicyError, "p.yaml").data


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x 1\nb: *x", "a uses a YAML anchor or alias"),
        ("a: *x", "a uses a YAML anchor or alias"),
        ("&x a: 1", "key that is not a plain word"),
        ("a: 1\nb:\n  a: 1\n  a: 2", r"b.a is given twice; keep one \(line 4\)"),
        ("a: !!python/object/apply:os.system [ls]", "YAML tag"),
        ("a: !!str 3", "YAML tag"),
        ("a: !x {}", "YAML tag"),
        ("? [a]\n: 1", "key that is not a plain word"),
        ("a: [" + "[" * 40 + "]" * 41, "nested more than 16 levels"),
        ("a: 1\n---\na: 2", "more than one document"),
        ("", "is empty"),
        ("a: [1", "not valid YAML"),
        ("a: 'x", "not valid YAML"),
        ("\ta: 1", "not valid YAML"),
    ],
)
def test_what_expands_repeats_or_executes_is_refused_with_its_place(text: str, words: str) -> None:
    """Aliases, anchors, tags, duplicate keys, deep nesting and broken YAML are refused in one line."""
    with pytest.raises(PolicyError, match=f"^p.yaml: .*{words}") as error:
        parse(text)
    assert len(str(error.value).splitlines()) == 1


def test_alias_bomb_is_refused_before_it_expands() -> None:
    """The billion-laughs document stops at its first anchor."""
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(PolicyError, match=r"^p.yaml: a uses a YAML anchor"):
        parse(bomb)


def test_file_over_one_mebibyte_is_refused(tmp_path: Path) -> None:
    """No more than the bound is ever read."""
    path = tmp_path / "big.yaml"
    path.write_bytes(b"a: " + b"x" * MAX_BYTES)
    with pytest.raises(PolicyError, match="larger than the limit of 1048576 bytes"):
        read_yaml(path, PolicyError)


def test_missing_file_and_bad_bytes_are_one_line(tmp_path: Path) -> None:
    """A missing file and one that is not UTF-8 are refused by name."""
    with pytest.raises(PolicyError, match="cannot be read"):
        read_yaml(tmp_path / "no.yaml", PolicyError)
    (tmp_path / "bad.yaml").write_bytes(b"a: \xff")
    with pytest.raises(PolicyError, match="not UTF-8"):
        read_yaml(tmp_path / "bad.yaml", PolicyError)


def test_plain_scalars_mean_what_yaml_1_2_says() -> None:
    """No 1.1 surprises: words stay words, 1e5 is a number, 010 and dates are text."""
    values = parse("[yes, on, no, 1e5, 010, 2024-01-01, 1:30, 0, -7, .5, ~, true, '3', .inf]")
    assert values == [
        "yes",
        "on",
        "no",
        1e5,
        "010",
        "2024-01-01",
        "1:30",
        0,
        -7,
        0.5,
        None,
        True,
        "3",
        float("inf"),
    ]


def test_lines_of_values_are_known() -> None:
    """A path leads to the line of its key."""
    document = parse_yaml(b"a: 1\nb:\n  - x\n  - c: 2\n", PolicyError, "p.yaml")
    assert document.where(("b", 1, "c")) == " (line 4)"
    assert document.where(("b", 1, "missing")) == " (line 4)"
    assert document.where(("missing",)) == ""


@given(st.text(max_size=300))
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    """Arbitrary text gives a document or a `PolicyError`, never another exception."""
    with contextlib.suppress(PolicyError):
        parse_yaml(text.encode("utf-8", "surrogatepass"), PolicyError, "p.yaml")
