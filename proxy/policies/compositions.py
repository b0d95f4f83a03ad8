"""Plans of several policies that are mandatory for one request, made and swapped with their members."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Iterable, Mapping
from datetime import UTC, datetime

from interpretops.errors import EngineError
from interpretops.plan import read_plan
from interpretops.plan.compose import SEPARATOR, compose_plans
from interpretops.plan.reach import steers_prompt_alike
from proxy.policies.policy_files import Revision
from proxy.policies.residency import Residency


def joint_name(policies: Collection[str]) -> str:
    """Under what name several policies are one."""
    return SEPARATOR.join(sorted(policies))


class Compositions:
    """One revision for each set of policies that can be mandatory together."""

    def __init__(self, sets: Collection[frozenset[str]], residency: Residency) -> None:
        self._sets = {joint_name(members): members for members in sets}
        self._residency = residency
        self._current: dict[str, Revision] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sets

    @property
    def missing(self) -> list[str]:
        """Sets that have no plan in the engine."""
        return [name for name in self._sets if self.active(name) is None]

    def active(self, name: str) -> Revision | None:
        """The revision of a set that is resident, made of the revisions that are active."""
        revision = self._current.get(name)
        return revision if revision is not None and revision in self._residency else None

    @property
    def current(self) -> list[Revision]:
        """The revisions of all sets that have one."""
        return list(self._current.values())

    async def load(self, fresh: Revision, active: Mapping[str, Revision]) -> dict[str, Revision]:
        """Make resident what ``fresh`` brings into all its sets whose other members are active.

        Raises `PlanError` or `EngineError`; nothing serves differently until `swap`. Of a load that fails
        half-way nothing stays in the engines.
        """
        made: dict[str, Revision] = {}
        for name, members in self._sets.items():
            parts = {**active, fresh.policy: fresh}
            if fresh.policy in members and members <= parts.keys():
                made[name] = await asyncio.to_thread(_compose, name, [parts[policy] for policy in members])
        loaded: list[Revision] = []
        try:
            for revision in made.values():
                await self._residency.load(revision)
                loaded.append(revision)
        except BaseException:
            self.give_up(loaded)
            raise
        return made

    def give_up(self, made: Iterable[Revision]) -> None:
        """Free what was loaded and will not serve."""
        serving = {revision.revision for revision in self.current}
        for revision in made:
            if revision.revision not in serving:
                self._residency.retire(revision)

    def swap(self, made: Mapping[str, Revision]) -> None:
        """From here on every request that is accepted gets what was made; what it replaces is freed."""
        for name, revision in made.items():
            old = self._current.get(name)
            self._current[name] = revision
            if old is not None and old.revision != revision.revision:
                self._residency.retire(old)

    async def restore(self) -> dict[str, str]:
        """Load again where an engine lacks it; why that failed, by name. One that fails keeps no other."""
        failed: dict[str, str] = {}
        for revision in self.current:
            if not self._residency.everywhere(revision):
                try:
                    await self._residency.load(revision)
                except EngineError as error:
                    failed[revision.policy] = str(error)
        return failed

    def forget(self) -> None:
        """All of it was compiled for another model."""
        self._current.clear()


def _compose(name: str, parts: list[Revision]) -> Revision:
    plan = compose_plans([read_plan(part.plan) for part in parts])
    data = plan.to_bytes()
    return Revision(
        policy=name,
        revision=hashlib.sha256(data).hexdigest(),
        plan=data,
        digest=plan.digest(),
        description="",
        target_class=plan.target_class,
        file=parts[0].file,
        model_fingerprint=plan.model.fingerprint,
        compiled_at=datetime.now(UTC),
        criteria=None,
        card="its members' cards speak for it",
        proven=True,
        steers_prompt=steers_prompt_alike(plan),
    )
