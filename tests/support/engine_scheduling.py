"""How workers share the tests: one runs every file that starts engines, the others the rest, file by file."""

from functools import cache
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

ENGINE = "engine"


@cache
def scope_of(file: Path) -> str:
    """The files that go to one worker together: those with a test marked `engine`, or the file alone."""
    return ENGINE if "mark.engine" in file.read_text(encoding="utf-8") else str(file)


class EnginesInOneWorker(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """`loadfile`, with all files that start engines taken as one.

    `loadgroup` would do it by the tests' own marks, but xdist 3.8 adds the group to a test's id in a way that
    pytest 9.2 does not see: every test was alone in its group, and both workers started engines.
    """

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        self._top = config.rootpath

    def _split_scope(self, nodeid: str) -> str:
        return scope_of(self._top / nodeid.partition("::")[0])
