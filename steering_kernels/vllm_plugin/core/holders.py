"""Which gateways need which revisions, so that one that is done with a plan does not take it from another."""

from __future__ import annotations

import time
from collections.abc import Callable

LEASE_S = 60.0
"""A gateway that has not been heard of for so long needs nothing any more. It asks every few seconds."""


class Holders:
    """Revisions by the gateways that loaded them. A gateway without a name is one like any other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._heard: dict[str, float] = {}
        self._of: dict[str, set[str]] = {}

    def hear(self, holder: str) -> None:
        """A gateway lives."""
        self._heard[holder] = self._clock()

    def orphans(self) -> list[str]:
        """The revisions that no living gateway holds any more; they are forgotten here."""
        now = self._clock()
        for gone in [name for name, heard in self._heard.items() if now - heard > LEASE_S]:
            del self._heard[gone]
            for holders in self._of.values():
                holders.discard(gone)
        orphans = [revision for revision, holders in self._of.items() if not holders]
        for revision in orphans:
            del self._of[revision]
        return orphans

    def hold(self, holder: str, revision: str) -> None:
        """A gateway needs a revision."""
        self._of.setdefault(revision, set()).add(holder)

    def let_go(self, holder: str, revision: str) -> bool:
        """A gateway needs it no more; True when no other does."""
        holders = self._of.get(revision, set())
        holders.discard(holder)
        if not holders:
            self._of.pop(revision, None)
        return not holders
