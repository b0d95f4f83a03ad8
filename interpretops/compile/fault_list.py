"""Collects the faults of a policy, so that all are reported together and in one format."""

from interpretops.errors import PolicyError
from interpretops.files.strict_yaml import Document, KeyPath, show_path


class FaultList:
    """Lines ``file: path = value, but ... (line N)`` about one document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._lines: dict[str, None] = {}

    def add(self, path: KeyPath, text: str) -> None:
        """Add a fault; ``text`` follows the path, for example ``= 9, but ...``."""
        line = f"{self._document.source}: {show_path(path)} {text}{self._document.where(path)}"
        self._lines[line] = None

    def show(self, path: KeyPath) -> str:
        """A path as the fault lines print it."""
        return show_path(path)

    def raise_if_any(self) -> None:
        """Raise `PolicyError` with all lines, if there are any."""
        if self._lines:
            raise PolicyError(*self._lines)
