"""One policy in the catalogue: its active, candidate and previous revisions, and its Risk Card status."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from proxy.policies.policy_files import Revision


@dataclass
class Entry:
    """One policy: its revisions by state, and the error of its newest file."""

    policy: str
    active: Revision | None = None
    previous: Revision | None = None
    """The revision active before; retired, and kept for a rollback."""
    candidate: Revision | None = None
    """The revision that waits for its Risk Card, for an override, or since a rollback."""
    candidate_state: Literal["candidate", "shadow"] = "candidate"
    waits_for: str | None = None
    """Why the candidate does not serve."""
    rolled_back: bool = False
    """The candidate was active and was rolled back. Only an operator can activate it again."""
    unproven: str | None = None
    """Why the active revision's Risk Card does not pass, where the settings let it serve anyway."""
    error: str | None = None
    """Why the newest file is not served."""

    def wait(self, fresh: Revision, why: str, *, rolled_back: bool = False) -> None:
        """Keep a revision as candidate. A shadow whose file is only read again stays a shadow."""
        if self.candidate is None or self.candidate.revision != fresh.revision:
            self.candidate_state = "candidate"
        self.candidate, self.waits_for = fresh, why
        self.rolled_back = rolled_back

    def is_held(self, fresh: Revision) -> bool:
        """Whether this is the revision that was rolled back."""
        return self.rolled_back and self.candidate is not None and self.candidate.revision == fresh.revision

    @property
    def shadow(self) -> Revision | None:
        """The candidate, while it runs in shadow of the active revision."""
        return self.candidate if self.candidate_state == "shadow" else None

    def swap(self, fresh: Revision) -> Revision | None:
        """Activate a revision; returns the one it replaces."""
        old = self.active
        self.previous, self.active, self.candidate, self.waits_for = old, fresh, None, None
        self.candidate_state, self.unproven, self.rolled_back = "candidate", None, False
        return old

    def forget(self) -> None:
        """Drop all revisions: they were compiled for another model."""
        self.active = self.previous = self.candidate = self.waits_for = self.unproven = None
        self.candidate_state = "candidate"

    def summary(self, in_flight: int) -> dict[str, Any]:
        """For the admin API."""
        active = self.active
        states = ((active, "active"), (self.candidate, self.candidate_state), (self.previous, "retired"))
        return {
            "id": self.policy,
            "state": "unavailable" if active is None else "active",
            "revision": _name(active),
            "loaded_at": None if active is None else active.compiled_at.isoformat(),
            "description": None if active is None else active.description,
            "target_class": None if active is None else active.target_class,
            "file": None if active is None else str(active.file),
            "revisions": [
                {"revision": revision.revision, "state": state, "card": revision.card}
                for revision, state in states
                if revision is not None
            ],
            "previous": _name(self.previous),
            "candidate": _name(self.candidate),
            "waits_for": self.waits_for,
            "unproven": self.unproven,
            "in_flight": in_flight,
            "error": self.error,
        }


@dataclass
class ReloadReport:
    """The result of a reload."""

    loaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """Candidates, and what each is waiting for."""
    keys: dict[str, Any] | None = None
    """Result of reading the key file, if any: number of keys loaded, skipped keys, and the error."""

    def summary(self) -> dict[str, Any]:
        """As JSON, for the admin API and the log."""
        found = {
            "ok": not self.failed,
            "loaded": self.loaded,
            "removed": self.removed,
            "failed": self.failed,
            "waiting": self.waiting,
        }
        return found if self.keys is None else {**found, "keys": self.keys}


def _name(revision: Revision | None) -> str | None:
    return None if revision is None else revision.revision
