"""Tracks which gateways hold which revisions, so that one gateway cannot retire a plan another still uses."""

from __future__ import annotations

import time
from collections.abc import Callable

LEASE_S = 60.0
"""A gateway that has not renewed for this long holds nothing. Gateways renew every few seconds."""


class Holders:
    """Which gateways hold each revision. Gateways that send no name count as one gateway."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._renewed_at: dict[str, float] = {}
        self._holders_of: dict[str, set[str]] = {}

    def renew(self, holder: str) -> None:
        """Renew a gateway's lease."""
        self._renewed_at[holder] = self._clock()

    def orphans(self) -> list[str]:
        """Remove and return the revisions that no live gateway holds."""
        now = self._clock()
        for expired in [name for name, renewed_at in self._renewed_at.items() if now - renewed_at > LEASE_S]:
            del self._renewed_at[expired]
            for holders in self._holders_of.values():
                holders.discard(expired)
        orphans = [revision for revision, holders in self._holders_of.items() if not holders]
        for revision in orphans:
            del self._holders_of[revision]
        return orphans

    def hold(self, holder: str, revision: str) -> None:
        """A gateway starts to hold a revision."""
        self._holders_of.setdefault(revision, set()).add(holder)

    def release(self, holder: str, revision: str) -> bool:
        """A gateway releases a revision. Returns True if no other gateway holds it."""
        holders = self._holders_of.get(revision, set())
        holders.discard(holder)
        if not holders:
            self._holders_of.pop(revision, None)
        return not holders
