"""The policies that can be served: which revision of each is active, and the safe change to the next."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from interpretops.errors import EngineError, InterpretOpsError, PolicyError
from proxy.binding import NONE
from proxy.engine_link import EngineLink, ProvenEngine
from proxy.metrics import Metrics
from proxy.policy_files import BrokenPolicyError, Revision, compile_file, find_policies
from proxy.refusal import PolicyUnavailable, UnknownPolicy


@dataclass
class Entry:
    """One policy: what serves, what served before it, and what is wrong with its newest file."""

    policy: str
    active: Revision | None = None
    previous: Revision | None = None
    candidate: Revision | None = None
    """What a rollback set aside; `promote` makes it active again."""
    error: str | None = None


@dataclass
class ReloadReport:
    """What a reload did."""

    loaded: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


class Catalogue:
    """All policies of a folder, each with at most one active revision that is resident in the engine.

    A change goes: compile, load into the engine, hear every rank attest it, then swap. Whatever fails on the
    way, the active revision stays. A request pins its revision, and a revision leaves the engine only when
    nothing pins it any more, so that no change ever refuses a request that was accepted before it.
    """

    def __init__(
        self,
        folder: Path,
        artifacts: Path,
        demanded: Collection[str],
        link: EngineLink,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self._folder = folder
        self._artifacts = artifacts
        self._demanded = frozenset(demanded)
        self._link = link
        self._metrics = metrics
        self._log = log
        self.entries: dict[str, Entry] = {}
        self.file_errors: dict[Path, str] = {}
        """Why a file is not what serves, or serves nothing."""
        self._seen: dict[Path, str] = {}
        self._owner: dict[Path, str] = {}
        self._resident: set[str] = set()
        self._pins: Counter[str] = Counter()
        self._retiring: set[str] = set()
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def missing(self) -> list[str]:
        """Policies that bindings demand and that cannot be served now."""
        return sorted(policy for policy in self._demanded if not self._available(policy))

    def in_flight(self, revision: str) -> int:
        """Requests in progress under a revision."""
        return self._pins[revision]

    @contextmanager
    def pin(self, policy: str) -> Iterator[Revision | None]:
        """The active revision of ``policy``, kept in the engine until the block ends; None for ``none``."""
        if policy == NONE:
            yield None
            return
        active = self.entries[policy].active if self._available(policy) else None
        if active is None:
            raise PolicyUnavailable(f"policy {policy!r} is not loaded at the moment; see the gateway's log")
        revision = active.revision
        self._pins[revision] += 1
        try:
            yield active
        finally:
            self._pins[revision] -= 1
            if not self._pins[revision]:
                del self._pins[revision]
                if revision in self._retiring:
                    self._spawn_retire(revision)

    async def prepare(self, engine: ProvenEngine) -> None:
        """Load everything into an engine that has nothing yet."""
        async with self._lock:
            self._resident.clear()
            self._retiring.clear()
            for entry in self.entries.values():
                if entry.active is not None and entry.active.model_fingerprint != engine.spec.fingerprint:
                    entry.active = entry.previous = entry.candidate = None
                    self._seen.clear()
            await self._reload(engine, force=False)

    async def reload(self, *, force: bool = False) -> ReloadReport:
        """Bring in what changed; with ``force``, compile every file again (new dictionaries)."""
        async with self._lock:
            return await self._reload(self._engine(), force=force)

    async def rollback(self, policy: str) -> Revision:
        """Make the revision before the active one active again, and keep the other as candidate."""
        async with self._lock:
            entry = self._entry(policy)
            if entry.previous is None:
                raise PolicyError(f"policy {policy!r} has no previous revision to go back to")
            target, aside = entry.previous, entry.active
            await self._activate(self._engine(), entry, target)
            entry.previous, entry.candidate = None, aside
            return target

    async def promote(self, policy: str) -> Revision:
        """Make the candidate active."""
        async with self._lock:
            entry = self._entry(policy)
            if entry.candidate is None:
                raise PolicyError(f"policy {policy!r} has no candidate to promote")
            target = entry.candidate
            await self._activate(self._engine(), entry, target)
            return target

    async def close(self) -> None:
        """Wait for what is still being tidied up."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _available(self, policy: str) -> bool:
        entry = self.entries.get(policy)
        return entry is not None and entry.active is not None and entry.active.revision in self._resident

    def _engine(self) -> ProvenEngine:
        engine = self._link.current
        if engine is None:
            raise EngineError("the engine is not ready; policies are loaded when it is")
        return engine

    def _entry(self, policy: str) -> Entry:
        if policy not in self.entries:
            raise UnknownPolicy(f"policy {policy[:64]!r} does not exist")
        return self.entries[policy]

    async def _reload(self, engine: ProvenEngine, *, force: bool) -> ReloadReport:
        report = ReloadReport()
        try:
            files = await asyncio.to_thread(find_policies, self._folder)
        except PolicyError as error:
            files = dict(self._seen)
            self._note_failure(report, self._folder, None, str(error))
        else:
            self.file_errors.pop(self._folder, None)
            self._forget_deleted(files, report)
        for path, digest in files.items():
            if force or self._seen.get(path) != digest:
                await self._bring_in(engine, path, digest, report, force=force)
        for entry in self.entries.values():
            if entry.active is not None and entry.active.revision not in self._resident:
                await self._restore(engine, entry, report)
        return report

    async def _bring_in(
        self, engine: ProvenEngine, path: Path, digest: str, report: ReloadReport, *, force: bool
    ) -> None:
        """Compile one file and make it active."""
        try:
            fresh = await asyncio.to_thread(compile_file, path, engine.spec, self._artifacts)
        except BrokenPolicyError as error:
            self._seen[path] = digest
            if error.policy is not None and not self._others(error.policy, path):
                self._owner.setdefault(path, error.policy)
            self._note_failure(report, path, self._owner.get(path), str(error))
            return
        if others := self._others(fresh.policy, path):
            self._seen[path] = digest
            text = f"{path}: meta.id = {fresh.policy!r}, but {others[0]} has that id already; choose another"
            self._note_failure(report, path, None, text)
            return
        former = self._owner.get(path)
        if former is not None and former != fresh.policy:
            self._withdraw(path, report)
        entry = self.entries.setdefault(fresh.policy, Entry(fresh.policy))
        held = force and entry.candidate is not None and entry.candidate.revision == fresh.revision
        try:
            if not held and (entry.active is None or entry.active.revision != fresh.revision):
                await self._activate(engine, entry, fresh)
                report.loaded.append(fresh.label)
        except EngineError as error:
            # Not remembered as seen: the next look tries again.
            self._note_failure(report, path, fresh.policy, f"{path}: {error}")
            return
        self._seen[path], self._owner[path] = digest, fresh.policy
        self.file_errors.pop(path, None)
        entry.error = None
        self._metrics.policy_broken.labels(entry.policy).set(0)

    def _others(self, policy: str, path: Path) -> list[Path]:
        """Other files that have this id."""
        return [other for other, owned in self._owner.items() if owned == policy and other != path]

    async def _activate(self, engine: ProvenEngine, entry: Entry, fresh: Revision) -> None:
        """Load into the engine, then swap: from here on every request that is accepted gets ``fresh``."""
        await engine.client.load(fresh.revision, fresh.plan, fresh.digest)
        old = entry.active
        self._resident.add(fresh.revision)
        self._retiring.discard(fresh.revision)
        entry.previous, entry.active, entry.candidate = old, fresh, None
        if old is not None:
            self._metrics.policy_info.remove(entry.policy, old.revision[:12])
            self._retire(old.revision)
        self._metrics.policy_info.labels(entry.policy, fresh.revision[:12]).set(1)
        self._metrics.reloads.labels("ok").inc()
        self._log.info("policy_active", policy=entry.policy, revision=fresh.revision, file=str(fresh.file))

    async def _restore(self, engine: ProvenEngine, entry: Entry, report: ReloadReport) -> None:
        """Load an active revision again, into an engine that was restarted."""
        assert entry.active is not None
        active = entry.active
        try:
            await engine.client.load(active.revision, active.plan, active.digest)
        except EngineError as error:
            self._note_failure(report, active.file, entry.policy, f"{active.file}: {error}")
            return
        self._resident.add(active.revision)
        report.loaded.append(active.label)

    def _forget_deleted(self, files: Mapping[Path, str], report: ReloadReport) -> None:
        for path in [path for path in self._seen if path not in files]:
            policy = self._owner.get(path)
            if policy in self._demanded:
                text = (
                    f"{path}: deleted, but bindings demand policy {policy!r}; its last revision keeps serving"
                )
                self._note_failure(report, path, policy, text)
                self._seen[path] = "deleted"
                continue
            self._withdraw(path, report)

    def _withdraw(self, path: Path, report: ReloadReport) -> None:
        """Take a policy out of service; requests in progress finish under it."""
        self._seen.pop(path, None)
        self.file_errors.pop(path, None)
        policy = self._owner.pop(path, None)
        entry = self.entries.pop(policy, None) if policy is not None else None
        if entry is None:
            return
        report.removed.append(entry.policy)
        self._metrics.policy_broken.labels(entry.policy).set(0)
        self._log.info("policy_removed", policy=entry.policy, file=str(path))
        if entry.active is not None:
            self._metrics.policy_info.remove(entry.policy, entry.active.revision[:12])
            self._retire(entry.active.revision)

    def _note_failure(self, report: ReloadReport, path: Path, policy: str | None, text: str) -> None:
        report.failed[str(path)] = text
        if policy is not None:
            self.entries.setdefault(policy, Entry(policy)).error = text
            self._metrics.policy_broken.labels(policy).set(1)
        if self.file_errors.get(path) != text:
            self.file_errors[path] = text
            self._metrics.reloads.labels("failed").inc()
            self._log.error("policy_refused", policy=policy, file=str(path), error=text)

    def _retire(self, revision: str) -> None:
        self._retiring.add(revision)
        if not self._pins[revision]:
            self._spawn_retire(revision)

    def _spawn_retire(self, revision: str) -> None:
        task = asyncio.create_task(self._retire_now(revision))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _retire_now(self, revision: str) -> None:
        """Free a revision's rows, unless it came back into use while we waited."""
        async with self._lock:
            engine = self._link.current
            if engine is None or revision not in self._retiring or self._pins[revision]:
                return
            self._retiring.discard(revision)
            self._resident.discard(revision)
            try:
                await engine.client.retire(revision)
            except InterpretOpsError as error:
                self._log.warning("retire_failed", revision=revision, error=str(error))
