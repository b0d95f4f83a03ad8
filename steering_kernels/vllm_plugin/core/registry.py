"""The engine's admission: which revisions it may serve, and how many requests of each are in flight."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from interpretops.engine_api import EngineCode, ResidentPlan
from steering_kernels.vllm_plugin.request_args import RequestArgs


class NotAdmittedError(Exception):
    """The request demands a revision that this engine does not hold, or no policy where one is demanded."""

    def __init__(self, code: EngineCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class CacheUse:
    """What requests of a revision may do with the prefix cache."""

    reads: bool = True
    """Whether they may take blocks from it; not where a gate must see every prompt token."""
    keeps_answers: bool = True
    """Whether blocks of their answers may stay in it (`interpretops.plan.reach`)."""


@dataclass
class _Resident:
    digest: str
    cache_use: CacheUse
    requests: set[str] = field(default_factory=set)
    retired: bool = False


class Registry:
    """Resident revisions of one engine core. Thread-safe: requests are admitted on the input thread."""

    def __init__(self, *, pass_through: bool) -> None:
        self.pass_through = pass_through
        self._lock = threading.Lock()
        self._resident: dict[str, _Resident] = {}
        self._revision_of: dict[str, str] = {}

    def add(self, revision: str, digest: str, cache_use: CacheUse) -> None:
        """A revision is loaded on every rank; admit its requests, also if it was being retired."""
        with self._lock:
            entry = self._resident.setdefault(revision, _Resident(digest, cache_use))
            entry.retired = False

    def admit(self, request_id: str, args: RequestArgs) -> CacheUse:
        """Count a request in; returns how it may use the prefix cache. Raises `NotAdmittedError`."""
        if args.revision is None:
            if not self.pass_through:
                raise NotAdmittedError(
                    EngineCode.POLICY_DEMANDED, "this engine serves no request without a policy"
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

    def release(self, request_id: str) -> str | None:
        """A request has ended; returns its revision if that is retired and has no other in flight."""
        with self._lock:
            revision = self._revision_of.pop(request_id, None)
            if revision is None or revision not in self._resident:
                return None
            entry = self._resident[revision]
            entry.requests.discard(request_id)
            return revision if entry.retired and not entry.requests else None

    def retire(self, revision: str) -> int:
        """Admit no more requests of a revision; returns how many are in flight. Unknown ones count 0."""
        with self._lock:
            entry = self._resident.get(revision)
            if entry is None:
                return 0
            entry.retired = True
            return len(entry.requests)

    def drop_if_idle(self, revision: str) -> bool:
        """Forget a retired revision without requests; True if its rows are to be freed now."""
        with self._lock:
            entry = self._resident.get(revision)
            if entry is None or not entry.retired or entry.requests:
                return False
            del self._resident[revision]
            return True

    def resident(self) -> dict[str, ResidentPlan]:
        """What is resident, by revision."""
        with self._lock:
            return {
                revision: ResidentPlan(
                    digest=entry.digest, in_flight=len(entry.requests), retired=entry.retired
                )
                for revision, entry in self._resident.items()
            }
