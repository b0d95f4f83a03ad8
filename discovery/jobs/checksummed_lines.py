"""Results, one per line, appended as they come, so that a stopped run resumes without loss."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from discovery.errors import DiscoveryError
from discovery.jobs.checksummed_file import SUM, digest


class ChecksummedLines:
    """JSON objects in a file, each with its checksum. An incomplete last line is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> Iterator[dict[str, Any]]:
        """Every object. Lines without a checksum are accepted. Raises `DiscoveryError` for a damaged line."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                found = json.loads(line)
                total = found.pop(SUM, None)
            except (ValueError, RecursionError, AttributeError, TypeError) as error:
                raise self.damaged(number, "it is not a JSON object") from error
            if total is not None and total != digest(found):
                raise self.damaged(number, "its checksum does not match")
            yield found

    def append(self, value: dict[str, Any]) -> None:
        """Append an object to the file. Raises `DiscoveryError` if it cannot be written."""
        line = json.dumps({**value, SUM: digest(value)})
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise DiscoveryError(
                f"{self.path}: cannot be written ({error.strerror}); finished lines are kept: free "
                "space, and run the same command again to resume"
            ) from error

    def damaged(self, number: int, why: str) -> DiscoveryError:
        """The error for a line; lines are counted from 1."""
        return DiscoveryError(
            f"{self.path}: line {number} is damaged ({why}); delete that line to do it again"
        )
