"""Admission: which revisions the engine may serve, and which requests of each are in progress."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from interpretops.engine_api import EngineCode, ResidentPlan
from steering_kernels.vllm_plugin.request_args import RequestArgs


class NotAdmittedError(Exception):
    """The request's revision is not resident, or it names no policy where one is required."""

    def __init__(self, code: EngineCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class CacheUse:
    """How requests of a revision may use the prefix cache."""

    reads: bool = True
    """Whether they may reuse its blocks; not if a gate must see every prompt token."""
    keeps_answers: bool = True
    """Whether blocks of their answers may stay in it (`interpretops.plan.reach`)."""


@dataclass
class _Resident:
    digest: str
    cache_use: CacheUse
    refusals: Mapping[int, str]
    requests: set[str] = field(default_factory=set)
    retired: bool = False


class Registry:
    """Resident revisions of one engine core. Thread-safe: requests are admitted on the input thread."""

    def __init__(self, *, pass_through: bool) -> None:
        self.pass_through = pass_through
        self._lock = threading.Lock()
        self._resident: dict[str, _Resident] = {}
        self._revision_of: dict[str, str] = {}

    def add(
        self, revision: str, digest: str, cache_use: CacheUse, refusals: Mapping[int, str] | None = None
    ) -> None:
        """Admit requests of a revision that is loaded on every rank, even if it was being retired.

        ``refusals``: the texts of its refusal gates, by index of the gate.
        """
        with self._lock:
            entry = self._resident.setdefault(revision, _Resident(digest, cache_use, refusals or {}))
            entry.retired = False

    def admit(self, request_id: str, args: RequestArgs) -> CacheUse:
        """Admit a request; returns how it may use the prefix cache. Raises `NotAdmittedError`."""
        if args.revision is None:
            if not self.pass_through:
                raise NotAdmittedError(
                    EngineCode.POLICY_DEMANDED, "this engine refuses requests without a policy"
                )
            return CacheUse()
        with self._lock:
            entry = self._resident.get(args.revision)
            if entry is None or entry.retired:
                raise NotAdmittedError(
                    EngineCode.NOT_RESIDENT, f"revision {args.revision[:12]} is not resident"
                )
            entry.requests.add(request_id)
            self._revision_of[request_id] = args.revision
            return entry.cache_use

    def refusal(self, request_id: str, gate: int) -> str:
        """The text of a refusal gate of an admitted request's revision. Raises KeyError if there is none."""
        with self._lock:
            return self._resident[self._revision_of[request_id]].refusals[gate]

    def release(self, request_id: str) -> str | None:
        """End a request; returns its revision if that is retired and this was its last request."""
        with self._lock:
            revision = self._revision_of.pop(request_id, None)
            if revision is None or revision not in self._resident:
                return None
            entry = self._resident[revision]
            entry.requests.discard(request_id)
            return revision if entry.retired and not entry.requests else None

    def retire(self, revision: str) -> int:
        """Admit no more requests of a revision; returns how many are in progress, 0 if it is unknown."""
        with self._lock:
            entry = self._resident.get(revision)
            if entry is None:
                return 0
            entry.retired = True
            return len(entry.requests)

    def drop_if_idle(self, revision: str) -> bool:
        """Forget a revision if it is retired and idle. Returns True if its rows must be freed now."""
        with self._lock:
            entry = self._resident.get(revision)
            if entry is None or not entry.retired or entry.requests:
                return False
            del self._resident[revision]
            return True

    def resident(self) -> dict[str, ResidentPlan]:
        """The resident plans, by revision."""
        with self._lock:
            return {
                revision: ResidentPlan(
                    digest=entry.digest, in_flight=len(entry.requests), retired=entry.retired
                )
                for revision, entry in self._resident.items()
            }
