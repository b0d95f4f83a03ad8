"""Collecting the faults of a policy, so that all of them are told at once and in one form."""

from interpretops.errors import PolicyError
from interpretops.files.strict_yaml import Document, KeyPath, show_path


class FaultList:
    """Lines ``file: path = value, but ... (line N)`` about one document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._lines: dict[str, None] = {}

    def add(self, path: KeyPath, text: str) -> None:
        """Note a fault; ``text`` goes on after the path, as ``= 9, but ...``."""
        line = f"{self._document.source}: {show_path(path)} {text}{self._document.where(path)}"
        self._lines[line] = None

    def show(self, path: KeyPath) -> str:
        """A path as it stands in the lines."""
        return show_path(path)

    def raise_if_any(self) -> None:
        """Raise `PolicyError` with all lines."""
        if self._lines:
            raise PolicyError(*self._lines)
