"""The documentation for tests: its pages, code blocks, and shell commands."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
GENERATED = frozenset({"docs/configuration.md", "docs/fields.md", "docs/policy-reference.md"})
"""Pages that `make docs` generates."""


def name_of(document: Path) -> str:
    """The page's path relative to the repository root."""
    return str(document.relative_to(ROOT))


def blocks(document: Path, language: str) -> list[str]:
    """The fenced code blocks of one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@dataclass(frozen=True)
class Command:
    """One shell command of a page."""

    document: str
    text: str
    """The command as typed, possibly over several lines, without its comment."""

    @property
    def words(self) -> list[str]:
        """Its words, with quotes resolved."""
        return shlex.split(self.text)


def commands(document: Path) -> list[Command]:
    """The shell commands in a page's ```sh blocks, in order."""
    return [Command(name_of(document), text) for block in blocks(document, "sh") for text in _typed(block)]


def _typed(block: str) -> Iterator[str]:
    """Join lines into commands where a quote is open or a line ends in a backslash."""
    pending = ""
    for line in block.splitlines():
        pending += re.sub(r"\s+# .*$", "", line)
        try:
            shlex.split(pending)
        except ValueError:  # an open quote, or a backslash at the end
            pending += "\n"
            continue
        yield pending.replace("\\\n", " ").strip()
        pending = ""
    assert not pending, f"a command has no end: {pending!r}"
