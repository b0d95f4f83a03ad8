"""The policies that can be served: the state of each revision, and safe switches between revisions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from structlog.typing import FilteringBoundLogger

from interpretops.errors import EngineError, PlanError, PolicyError
from interpretops.plan.compose import SEPARATOR
from proxy.engines.fleet import Fleet
from proxy.errors import PolicyUnavailable, UnknownPolicy
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Reason
from proxy.observe.supervisor import Supervisor
from proxy.policies.binding import NONE
from proxy.policies.compositions import Compositions, joint_name
from proxy.policies.entry import Entry, ReloadReport
from proxy.policies.policy_files import Revision, judge
from proxy.policies.residency import Residency
from proxy.process.file_reader import Reader, StuckError

_CARD_S: Final = 10.0
"""Longest wait for a Risk Card; the catalogue's lock is held meanwhile."""


class Catalogue:
    """All policies, each with at most one active revision.

    A change loads the revision into the engines, waits until every rank has attested it, then swaps. If any
    step fails, the active revision stays.
    """

    def __init__(
        self,
        folder: Path,
        required: Collection[str],
        fleet: Fleet,
        metrics: Metrics,
        log: FilteringBoundLogger,
        supervisor: Supervisor,
        *,
        joint: Collection[frozenset[str]] = (),
        require_cards: bool = False,
        record: Callable[..., None] = lambda event, **fields: None,
    ) -> None:
        self._require_cards = require_cards
        self._record = record
        self._folder = folder
        self._cards = Reader(f"Risk Cards in {folder}", _CARD_S)
        self._fleet = fleet
        self.required = frozenset(required)
        """Policies that bindings require."""
        self._metrics = metrics
        self._log = log
        self.residency = Residency(fleet, metrics, log, supervisor)
        self.compositions = Compositions(joint, self.residency)
        metrics.receipts_failed.labels(NONE)
        for name in (*self.required, *map(joint_name, joint)):
            metrics.init_policy_series(name)
        self.entries: dict[str, Entry] = {}
        self.suspended: dict[str, str] = {}
        """Policy to the revision that is suspended for exceeding its latency budget."""
        self.lock = asyncio.Lock()
        """Held while revisions change state."""

    @property
    def missing(self) -> list[str]:
        """Policies that bindings require and that cannot be served now."""
        alone = sorted(policy for policy in self.required if self._available(policy) is None)
        return [*alone, *self.compositions.missing]

    def not_ready(self) -> Iterator[Reason]:
        """Why bound requests are refused. Empty without an engine: the fleet reports that."""
        if self._fleet.current is None:
            return
        if missing := self.missing:
            detail = f"bindings require policies that are not loaded: {', '.join(missing)}"
            yield Reason("policy_missing", detail)
        if suspended := sorted(filter(self.is_suspended, self.required)):
            detail = f"bindings require policies that are suspended: {', '.join(suspended)}"
            yield Reason("policy_suspended", detail)

    @contextmanager
    def pin(self, policy: str) -> Iterator[Revision | None]:
        """The active revision of ``policy``, kept in the engines until the block ends; None for ``none``."""
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
        """Whether the active revision of ``policy`` is suspended."""
        entry = self.entries.get(policy)
        active = None if entry is None else entry.active
        return active is not None and self.suspended.get(policy) == active.revision

    async def rollback(self, policy: str, revision: str) -> Revision:
        """Reactivate ``revision``, the previous one. The current revision becomes the candidate."""
        async with self.lock:
            entry = self._entry(policy)
            if entry.previous is None:
                raise PolicyError(f"policy {policy!r} has no previous revision to go back to")
            target, aside = entry.previous, entry.active
            _check_unchanged(target, revision)
            await self.activate(entry, target)
            entry.previous = None
            if aside is not None:
                entry.wait(aside, "it was rolled back; promote it to serve it again", rolled_back=True)
            return target

    async def promote(self, policy: str, revision: str, *, override: bool = False) -> Revision:
        """Activate the candidate, if it is ``revision``. It needs a Risk Card that meets its criteria, or an
        override.
        """
        async with self.lock:
            entry = self._entry(policy)
            target = self.candidate(policy)
            _check_unchanged(target, revision)
            proven, why = await self.judge(target)
            if not proven and not override:
                raise PolicyError(
                    f"policy {policy!r} is not promoted: {why}; to promote it anyway, override with a reason"
                )
            await self.activate(entry, target)
            if not proven:
                self._note_unproven(entry, f"overridden: {why}")
            return target

    async def cast_shadow(self, policy: str, revision: str) -> Revision:
        """Run the candidate, if it is ``revision``, in shadow on a share of the active one's traffic."""
        async with self.lock:
            entry, target = self._entry(policy), self.candidate(policy)
            _check_unchanged(target, revision)
            await self.residency.load(target)
            entry.candidate_state = "shadow"
            self._record("policy_shadow", policy=policy, revision=target.revision)
            return target

    @property
    def required_revisions(self) -> list[Revision]:
        """Revisions that an engine must hold before it takes requests."""
        active = [entry.active for entry in self.entries.values() if entry.active is not None]
        return [*active, *self.compositions.current]

    def forget_others(self, fingerprint: str) -> bool:
        """Forget all revisions compiled for another model. Returns whether there were any."""
        outdated = [
            entry
            for entry in self.entries.values()
            if entry.active is not None and entry.active.model_fingerprint != fingerprint
        ]
        for entry in outdated:
            entry.forget()
        if outdated:
            self.compositions.forget()
        return bool(outdated)

    def shadow(self, policy: str) -> Revision | None:
        """The shadow revision of ``policy``, if it has one and an engine holds it."""
        entry = self.entries.get(policy)
        found = None if entry is None else entry.shadow
        return found if found is not None and found in self.residency else None

    def candidate(self, policy: str) -> Revision:
        """The candidate revision. Raises `PolicyError` when there is none."""
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

    def _entry(self, policy: str) -> Entry:
        if policy not in self.entries:
            raise UnknownPolicy(f"policy {policy[:64]!r} does not exist")
        return self.entries[policy]

    async def admit(self, entry: Entry, fresh: Revision, report: ReloadReport) -> None:
        """Activate a new revision, or keep it as candidate until a Risk Card passes or someone overrides."""
        if fresh.proven or (entry.active is None and not self._require_cards):
            await self.activate(entry, fresh)
            report.loaded.append(fresh.label)
            if not fresh.proven:
                self._note_unproven(entry, fresh.card)
            return
        if entry.candidate is None or entry.candidate.revision != fresh.revision:
            self._log.warning(
                "policy_candidate", policy=entry.policy, revision=fresh.revision, why=fresh.card
            )
            self._record("policy_candidate", policy=entry.policy, revision=fresh.revision, why=fresh.card)
        self.end_shadow(entry, fresh)
        entry.wait(fresh, fresh.card)
        report.waiting[fresh.label] = fresh.card

    def end_shadow(self, entry: Entry, fresh: Revision) -> None:
        """Free the shadow revision if ``fresh`` replaces it."""
        shadow = entry.shadow
        if shadow is not None and shadow.revision != fresh.revision:
            entry.candidate_state = "candidate"
            self.residency.retire(shadow)

    async def judge(self, revision: Revision) -> tuple[bool, str]:
        try:
            return await self._cards.run(
                judge, revision.policy, revision.revision, self._folder, revision.criteria
            )
        except StuckError as error:
            return False, str(error)

    def _note_unproven(self, entry: Entry, why: str) -> None:
        assert entry.active is not None
        entry.unproven = why
        self._metrics.policy_unproven.labels(entry.policy).set(1)
        self._log.warning("policy_unproven", policy=entry.policy, revision=entry.active.revision, why=why)

    async def activate(self, entry: Entry, fresh: Revision) -> None:
        """Load ``fresh`` into the engines, then swap: every request accepted afterwards gets it."""
        self._metrics.init_policy_series(entry.policy)
        await self.residency.load(fresh)
        active = {policy: other.active for policy, other in self.entries.items() if other.active is not None}
        try:
            composed = await self.compositions.load(fresh, active)
        except BaseException as error:
            # Whatever the error, a revision that does not serve must not stay in the engines.
            if fresh.revision not in {kept.revision for kept in (entry.active, entry.shadow) if kept}:
                self.residency.retire(fresh)
            if isinstance(error, PlanError):
                raise EngineError(str(error)) from error
            raise
        self.end_shadow(entry, fresh)
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

    def remove(self, policy: str, path: Path, report: ReloadReport) -> None:
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


def _check_unchanged(target: Revision, revision: str) -> None:
    """Raise `PolicyError` if another revision has replaced the chosen one."""
    if target.revision != revision:
        raise PolicyError(
            f"policy {target.policy!r}: {target.label} has replaced {revision[:12]} in the meantime; "
            "review it, and name it"
        )
