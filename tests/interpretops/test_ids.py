"""Ids: what kind of thing, and when it was made."""

import re

import pytest

from interpretops.ids import id_pattern, made_at_ms, new_id


def test_id_says_what_it_is_of_and_when_it_was_made() -> None:
    """The prefix is the kind; the time comes back out of the 26 letters."""
    found = new_id("cx", now_ms=1_765_432_100_123)
    assert re.fullmatch(r"cx_[0-9A-HJKMNP-TV-Z]{26}", found)
    assert re.fullmatch(id_pattern("cx"), found)
    assert made_at_ms(found) == 1_765_432_100_123


def test_ids_sort_by_time_and_do_not_meet() -> None:
    """A later millisecond sorts behind an earlier one, and a thousand of one millisecond all differ."""
    assert new_id("run", now_ms=2**41) < new_id("run", now_ms=2**41 + 1)
    assert len({new_id("run", now_ms=5) for _ in range(1000)}) == 1000


@pytest.mark.parametrize(
    "wrong", ["cx_", "cx_8ZZZZZZZZZZZZZZZZZZZZZZZZZ", "cx_01JD8M0T5WABCDEFGHJKMNPQ", "x"]
)
def test_what_is_no_id_does_not_match(wrong: str) -> None:
    """Too short, or past the largest time that 48 bits hold."""
    assert not re.fullmatch(id_pattern("cx"), wrong)
