"""One policy in the catalogue: what serves, what waits, what served before, and what its card says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from proxy.policies.policy_files import Revision


@dataclass
class Entry:
    """One policy: its revisions by state, and what is wrong with its newest file."""

    policy: str
    active: Revision | None = None
    previous: Revision | None = None
    """What served before; retired, and kept for a rollback."""
    candidate: Revision | None = None
    """What waits to become active: for its card, for an override, or since a rollback."""
    candidate_state: Literal["candidate", "shadow"] = "candidate"
    waits_for: str | None = None
    """Why the candidate does not serve."""
    rolled_back: bool = False
    """The candidate served already and was taken back: only a person makes it serve again."""
    unproven: str | None = None
    """Why the active revision's card does not speak for it, where the settings let it serve all the same."""
    error: str | None = None
    """Why the newest file is not what serves."""

    def wait(self, fresh: Revision, why: str, *, rolled_back: bool = False) -> None:
        """Keep a revision aside."""
        self.candidate, self.candidate_state, self.waits_for = fresh, "candidate", why
        self.rolled_back = rolled_back

    def is_held(self, fresh: Revision) -> bool:
        """Whether a revision is the one that was rolled back."""
        return self.rolled_back and self.candidate is not None and self.candidate.revision == fresh.revision

    @property
    def shadow(self) -> Revision | None:
        """The candidate, while it is to run beside the active revision."""
        return self.candidate if self.candidate_state == "shadow" else None

    def swap(self, fresh: Revision) -> Revision | None:
        """Make a revision the active one; the one that was is returned."""
        old = self.active
        self.previous, self.active, self.candidate, self.waits_for = old, fresh, None, None
        self.candidate_state, self.unproven, self.rolled_back = "candidate", None, False
        return old

    def forget(self) -> None:
        """All of it was compiled for another model."""
        self.active = self.previous = self.candidate = self.waits_for = self.unproven = None
        self.candidate_state = "candidate"

    def shown(self, in_flight: int) -> dict[str, Any]:
        """For operators."""
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
    """What a reload did."""

    loaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    """Candidates, and what each waits for."""
    keys: dict[str, Any] | None = None
    """What became of the file of keys, if any: how many are in force, which are skipped, why it failed."""

    def shown(self) -> dict[str, Any]:
        """For whoever asked for it."""
        told = {
            "ok": not self.failed,
            "loaded": self.loaded,
            "removed": self.removed,
            "failed": self.failed,
            "waiting": self.waiting,
        }
        return told if self.keys is None else {**told, "keys": self.keys}


def _name(revision: Revision | None) -> str | None:
    return None if revision is None else revision.revision
