"""The threat model names a test for each trap; a renamed or removed test must be noticed."""

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "threat-model.md"


def test_every_named_test_exists() -> None:
    """Each trap in the threat model names a test that exists."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and "`test_" in line]
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    there = set(re.findall(r"def (test_\w+)\(", "".join(p.read_text() for p in TESTS.rglob("test_*.py"))))
    assert len(rows) >= 30
    assert named - there == set()
