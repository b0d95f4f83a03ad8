"""Everything that happened, as one hash, and the last lines of it for whoever looks for the cause."""

from __future__ import annotations

import hashlib
from collections import deque
from pathlib import Path

_KEPT = 400


class Trace:
    """Two runs are the same when their hashes are."""

    def __init__(self, *, keep_all: bool = False) -> None:
        self._hash = hashlib.sha256()
        self.lines: deque[str] = deque(maxlen=None if keep_all else _KEPT)
        self.root: Path | None = None
        """The folder of this run, whose name is not the same in the next."""

    def add(self, now: float, what: str, data: bytes = b"") -> None:
        """One more thing that happened."""
        if self.root is not None:
            what = what.replace(str(self.root), "<folder>")
            data = data.replace(str(self.root).encode(), b"<folder>")
        line = f"{now:.6f} {what}"
        self._hash.update(line.encode() + b"\0" + data + b"\0")
        shown = data.decode("latin-1").replace("\r\n", "\\n")
        self.lines.append(f"{line} {shown}" if data else line)

    @property
    def digest(self) -> str:
        """Of all until now."""
        return self._hash.hexdigest()
