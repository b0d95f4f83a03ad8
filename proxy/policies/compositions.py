"""Joint plans for policies that are mandatory together, composed and swapped along with their members."""

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
    """The name of a composition of several policies."""
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
        """Names of sets whose plan no engine holds."""
        return [name for name in self._sets if self.active(name) is None]

    def active(self, name: str) -> Revision | None:
        """The resident revision of a set, composed of its members' active revisions."""
        revision = self._current.get(name)
        return revision if revision is not None and revision in self._residency else None

    @property
    def current(self) -> list[Revision]:
        """The revisions of all sets that have one, resident or not."""
        return list(self._current.values())

    async def load(self, fresh: Revision, active: Mapping[str, Revision]) -> dict[str, Revision]:
        """Compose and load every set that contains ``fresh`` and whose other members are active.

        Raises `PlanError` or `EngineError`, and frees what it had loaded by then. Requests see no change
        until `swap`.
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
        """Free loaded revisions that will not serve."""
        serving = {revision.revision for revision in self.current}
        for revision in made:
            if revision.revision not in serving:
                self._residency.retire(revision)

    def swap(self, made: Mapping[str, Revision]) -> None:
        """Serve the new revisions to every request accepted from now on, and free the ones they replace."""
        for name, revision in made.items():
            old = self._current.get(name)
            self._current[name] = revision
            if old is not None and old.revision != revision.revision:
                self._residency.retire(old)

    async def restore(self) -> dict[str, str]:
        """Reload revisions that an engine lacks. Returns the errors by name; one failure stops no other."""
        failed: dict[str, str] = {}
        for revision in self.current:
            if not self._residency.everywhere(revision):
                try:
                    await self._residency.load(revision)
                except EngineError as error:
                    failed[revision.policy] = str(error)
        return failed

    def forget(self) -> None:
        """Drop all revisions: they were compiled for another model."""
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
        card="covered by its members' Risk Cards",
        proven=True,
        steers_prompt=steers_prompt_alike(plan),
    )
