"""The policies that can be served: which revision of each is active, and the safe change to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from interpretops.compose import SEPARATOR
from interpretops.errors import EngineError, PlanError, PolicyError
from proxy.binding import NONE
from proxy.compositions import Compositions
from proxy.engine_link import EngineLink, ProvenEngine
from proxy.entry import Entry, ReloadReport
from proxy.metrics import Metrics
from proxy.policy_files import (
    BrokenPolicyError,
    Revision,
    compile_file,
    file_digest,
    find_policies,
    judge,
)
from proxy.refusal import PolicyUnavailable, UnknownPolicy
from proxy.residency import Residency


class Catalogue:
    """All policies of a folder, each with at most one active revision that is resident in the engine.

    A change goes: compile, load into the engine, hear every rank attest it, then swap. Whatever fails on the
    way, the active revision stays.
    """

    def __init__(
        self,
        folder: Path,
        artifacts: Path,
        demanded: Collection[str],
        link: EngineLink,
        metrics: Metrics,
        log: FilteringBoundLogger,
        *,
        joint: Collection[frozenset[str]] = (),
        require_cards: bool = False,
        record: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self._require_cards = require_cards
        self._record = record
        self._folder = folder
        self._artifacts = artifacts
        self._demanded = frozenset(demanded)
        self._link = link
        self._metrics = metrics
        self._log = log
        self.residency = Residency(link, log)
        self.compositions = Compositions(joint, self.residency)
        self.entries: dict[str, Entry] = {}
        self.file_errors: dict[Path, str] = {}
        """Why a file is not what serves, or serves nothing."""
        self.suspended: dict[str, str] = {}
        """Revisions of policies under which requests are refused at the moment, for what they cost."""
        self._seen: dict[Path, str] = {}
        self._owner: dict[Path, str] = {}
        self._lock = asyncio.Lock()

    @property
    def missing(self) -> list[str]:
        """Policies that bindings demand and that cannot be served now."""
        alone = sorted(policy for policy in self._demanded if self._available(policy) is None)
        return [*alone, *self.compositions.missing]

    @contextmanager
    def pin(self, policy: str) -> Iterator[Revision | None]:
        """The active revision of ``policy``, kept in the engine until the block ends; None for ``none``."""
        if policy == NONE:
            yield None
            return
        if self.suspended and any(map(self.is_suspended, policy.split(SEPARATOR))):
            raise PolicyUnavailable(f"policy {policy!r} is suspended at the moment; try again later")
        active = self._available(policy)
        if active is None:
            raise PolicyUnavailable(f"policy {policy!r} is not loaded at the moment; see the gateway's log")
        with self.residency.pin(active):
            yield active

    def is_suspended(self, policy: str) -> bool:
        """Whether requests under the active revision of ``policy`` are refused at the moment."""
        entry = self.entries.get(policy)
        active = None if entry is None else entry.active
        return active is not None and self.suspended.get(policy) == active.revision

    async def prepare(self, engine: ProvenEngine) -> None:
        """Load everything into an engine that has nothing yet."""
        async with self._lock:
            self.residency.forget()
            compiled_for = {e.active.model_fingerprint for e in self.entries.values() if e.active is not None}
            if compiled_for - {engine.spec.fingerprint}:
                self.compositions.forget()
            for entry in self.entries.values():
                if entry.active is not None and entry.active.model_fingerprint != engine.spec.fingerprint:
                    entry.forget()
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
            entry.previous = None
            if aside is not None:
                entry.wait(aside, "it was rolled back; promote it to serve it again", rolled_back=True)
            return target

    async def promote(self, policy: str, *, override: bool = False) -> Revision:
        """Make the candidate active: on a Risk Card that meets its criteria, or by an override."""
        async with self._lock:
            entry = self._entry(policy)
            target = self.candidate(policy)
            proven, why = await self._judge(target)
            if not proven and not override:
                raise PolicyError(
                    f"policy {policy!r} is not promoted: {why}; or override that, with a reason"
                )
            await self._activate(self._engine(), entry, target)
            if not proven:
                self._note_unproven(entry, f"overridden: {why}")
            return target

    async def cast_shadow(self, policy: str) -> Revision:
        """Let the candidate run beside the active revision, on a share of its traffic, unseen."""
        async with self._lock:
            entry, target = self._entry(policy), self.candidate(policy)
            await self.residency.load(self._engine(), target)
            entry.candidate_state = "shadow"
            self._record("policy_shadow", policy=policy, revision=target.revision)
            return target

    def shadow(self, policy: str) -> Revision | None:
        """The revision that runs beside the active one of ``policy``, if there is one and it is resident."""
        entry = self.entries.get(policy)
        found = None if entry is None else entry.shadow
        return found if found is not None and found in self.residency else None

    def candidate(self, policy: str) -> Revision:
        """The revision that waits. Raises `PolicyError` when none does."""
        waiting = self._entry(policy).candidate
        if waiting is None:
            raise PolicyError(f"policy {policy!r} has no candidate to promote")
        return waiting

    def _available(self, policy: str) -> Revision | None:
        if policy in self.compositions:
            return self.compositions.active(policy)
        entry = self.entries.get(policy)
        active = None if entry is None else entry.active
        return active if active is not None and active in self.residency else None

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
            files = {}
            self._note_failure(report, self._folder, None, str(error))
        else:
            self.file_errors.pop(self._folder, None)
            self._forget_deleted(files, report)
        for entry in self.entries.values():
            if entry.active is not None and entry.active not in self.residency:
                await self._restore(engine, entry, report)
            if entry.shadow is not None and entry.shadow not in self.residency:
                # Lost with an engine; it waits as any candidate until a person casts it again.
                entry.candidate_state = "candidate"
            if entry.candidate is not None and not entry.rolled_back:
                await self._look_at_card(engine, entry, report)
        try:
            await self.compositions.restore(engine)
        except EngineError as error:
            self._note_failure(report, self._folder, None, f"composed policies: {error}")
        for path, digest in files.items():
            if force or self._seen.get(path) != digest:
                await self._bring_in(engine, path, digest, report, force=force)
        return report

    async def _restore(self, engine: ProvenEngine, entry: Entry, report: ReloadReport) -> None:
        """Load an active revision again, into an engine that was restarted."""
        active = entry.active
        assert active is not None
        try:
            await self.residency.load(engine, active)
        except EngineError as error:
            self._note_failure(report, active.file, entry.policy, f"{active.file}: {error}")
            # What its file is worth is looked at again once the engine takes it.
            self._seen.pop(active.file, None)
        else:
            report.loaded.append(active.label)

    async def _bring_in(
        self, engine: ProvenEngine, path: Path, digest: str, report: ReloadReport, *, force: bool
    ) -> None:
        """Compile one file and make it active."""
        former = self._owner.get(path)
        try:
            fresh = await asyncio.to_thread(compile_file, path, engine.spec, self._artifacts, self._folder)
            self._check_owner(path, fresh.policy)
        except BrokenPolicyError as error:
            if (now := await asyncio.to_thread(file_digest, path)) != digest:
                # Half written when we read it.
                await self._bring_in(engine, path, now, report, force=force)
                return
            self._seen[path] = digest
            if former is None and error.policy is not None and not self._files_of(error.policy):
                self._owner[path] = error.policy
            self._note_failure(report, path, self._owner.get(path), str(error))
            return
        self._owner[path] = fresh.policy
        entry = self.entries.setdefault(fresh.policy, Entry(fresh.policy))
        held = force and entry.is_held(fresh)
        try:
            if entry.active is not None and entry.active.revision == fresh.revision:
                if entry.active not in self.residency:
                    await self.residency.load(engine, entry.active)
                if not entry.rolled_back:
                    self._end_shadow(entry, entry.active)
                    # The file was changed back: what waited is nobody's wish any more.
                    entry.candidate = entry.waits_for = None
            elif not held:
                await self._admit(engine, entry, fresh, report)
        except EngineError as error:
            # Not remembered as seen: the next look tries again.
            self._note_failure(report, path, fresh.policy, f"{path}: {error}")
            return
        finally:
            if former is not None and former != fresh.policy:
                self._remove(former, path, report)
        self._seen[path] = digest
        self.file_errors.pop(path, None)
        entry.error = None
        self._metrics.policy_broken.labels(entry.policy).set(0)

    def _check_owner(self, path: Path, policy: str) -> None:
        """A policy has one file, and a file's policy is not renamed away while bindings demand it."""
        if others := [other for other in self._files_of(policy) if other != path]:
            raise BrokenPolicyError(
                None, f"{path}: meta.id = {policy!r}, but {others[0]} has that id already; choose another"
            )
        former = self._owner.get(path, policy)
        if former != policy and former in self._demanded:
            raise BrokenPolicyError(
                former, f"{path}: meta.id = {policy!r}, but bindings demand {former!r}; change them first"
            )

    def _files_of(self, policy: str) -> list[Path]:
        return [path for path, owned in self._owner.items() if owned == policy]

    async def _admit(self, engine: ProvenEngine, entry: Entry, fresh: Revision, report: ReloadReport) -> None:
        """Let a new revision serve, or wait until a Risk Card or an override speaks for it."""
        if fresh.proven or (entry.active is None and not self._require_cards):
            await self._activate(engine, entry, fresh)
            report.loaded.append(fresh.label)
            if not fresh.proven:
                self._note_unproven(entry, fresh.card)
            return
        if entry.candidate is None or entry.candidate.revision != fresh.revision:
            self._log.warning(
                "policy_candidate", policy=entry.policy, revision=fresh.revision, why=fresh.card
            )
            self._record("policy_candidate", policy=entry.policy, revision=fresh.revision, why=fresh.card)
        self._end_shadow(entry, fresh)
        entry.wait(fresh, fresh.card)
        report.waiting[fresh.label] = fresh.card

    async def _look_at_card(self, engine: ProvenEngine, entry: Entry, report: ReloadReport) -> None:
        """Serve a candidate whose card has come."""
        waiting = entry.candidate
        assert waiting is not None
        proven, why = await self._judge(waiting)
        if not proven:
            entry.waits_for = why
            return
        try:
            await self._activate(engine, entry, waiting)
        except EngineError as error:
            self._note_failure(report, waiting.file, entry.policy, f"{waiting.file}: {error}")
        else:
            report.loaded.append(waiting.label)

    def _end_shadow(self, entry: Entry, fresh: Revision) -> None:
        """Free a shadow that another revision takes the place of."""
        shadow = entry.shadow
        if shadow is not None and shadow.revision != fresh.revision:
            entry.candidate_state = "candidate"
            self.residency.retire(shadow)

    async def _judge(self, revision: Revision) -> tuple[bool, str]:
        return await asyncio.to_thread(
            judge, revision.policy, revision.revision, self._folder, revision.criteria
        )

    def _note_unproven(self, entry: Entry, why: str) -> None:
        assert entry.active is not None
        entry.unproven = why
        self._metrics.policy_unproven.labels(entry.policy).set(1)
        self._log.warning("policy_unproven", policy=entry.policy, revision=entry.active.revision, why=why)

    async def _activate(self, engine: ProvenEngine, entry: Entry, fresh: Revision) -> None:
        """Load into the engine, then swap: from here on every request that is accepted gets ``fresh``."""
        await self.residency.load(engine, fresh)
        active = {policy: other.active for policy, other in self.entries.items() if other.active is not None}
        try:
            composed = await self.compositions.load(engine, fresh, active)
        except (PlanError, EngineError) as error:
            if entry.active is None or entry.active.revision != fresh.revision:
                self.residency.retire(fresh)
            raise EngineError(str(error)) from error
        self._end_shadow(entry, fresh)
        old = entry.swap(fresh)
        self.compositions.swap(composed)
        self._metrics.policy_unproven.labels(entry.policy).set(0)
        if old is not None:
            self._metrics.policy_info.remove(entry.policy, old.revision[:12])
            self.residency.retire(old)
        self._metrics.policy_info.labels(entry.policy, fresh.revision[:12]).set(1)
        self._metrics.reloads.labels("ok").inc()
        self._log.info("policy_active", policy=entry.policy, revision=fresh.revision, file=str(fresh.file))
        self._record("policy_active", policy=entry.policy, revision=fresh.revision)

    def _forget_deleted(self, files: Mapping[Path, str], report: ReloadReport) -> None:
        known = {*self._seen, *self._owner, *self.file_errors} - {self._folder}
        for path in sorted(known - files.keys()):
            policy = self._owner.get(path)
            if policy in self._demanded:
                text = f"{path}: deleted, but bindings demand {policy!r}; its last revision keeps serving"
                self._note_failure(report, path, policy, text)
                self._seen[path] = "deleted"
                continue
            self._seen.pop(path, None)
            self._owner.pop(path, None)
            self.file_errors.pop(path, None)
            if policy is not None:
                self._remove(policy, path, report)

    def _remove(self, policy: str, path: Path, report: ReloadReport) -> None:
        """Take a policy out of service; requests in progress finish under it."""
        entry = self.entries.pop(policy, None)
        if entry is None:
            return
        report.removed.append(policy)
        self._metrics.policy_broken.labels(policy).set(0)
        self._metrics.policy_unproven.labels(policy).set(0)
        self._log.info("policy_removed", policy=policy, file=str(path))
        self._record("policy_removed", policy=policy)
        if entry.shadow is not None:
            self.residency.retire(entry.shadow)
        if entry.active is not None:
            self._metrics.policy_info.remove(policy, entry.active.revision[:12])
            self.residency.retire(entry.active)

    def _note_failure(self, report: ReloadReport, path: Path, policy: str | None, text: str) -> None:
        report.failed[str(path)] = text
        if policy is not None:
            self.entries.setdefault(policy, Entry(policy)).error = text
            self._metrics.policy_broken.labels(policy).set(1)
        if self.file_errors.get(path) != text:
            self.file_errors[path] = text
            self._metrics.reloads.labels("failed").inc()
            self._log.error("policy_refused", policy=policy, file=str(path), error=text)
