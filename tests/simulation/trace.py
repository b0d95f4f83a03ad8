"""All events as one hash, and the last lines for debugging."""

from __future__ import annotations

import hashlib
from collections import deque
from pathlib import Path

_KEPT = 400


class Trace:
    """Two runs are identical if their hashes are."""

    def __init__(self, *, keep_all: bool = False) -> None:
        self._hash = hashlib.sha256()
        self.lines: deque[str] = deque(maxlen=None if keep_all else _KEPT)
        self.root: Path | None = None
        """This run's folder, whose name differs between runs."""

    def add(self, now: float, what: str, data: bytes = b"") -> None:
        """Add an event."""
        if self.root is not None:
            what = what.replace(str(self.root), "<folder>")
            data = data.replace(str(self.root).encode(), b"<folder>")
        line = f"{now:.6f} {what}"
        self._hash.update(line.encode() + b"\0" + data + b"\0")
        shown = data.decode("latin-1").replace("\r\n", "\\n")
        self.lines.append(f"{line} {shown}" if data else line)

    @property
    def digest(self) -> str:
        """Hash of all events so far."""
        return self._hash.hexdigest()
