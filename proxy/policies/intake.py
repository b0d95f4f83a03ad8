"""Brings policy files into the catalogue: what is new is compiled, what an engine lost is loaded again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from structlog.typing import FilteringBoundLogger

from interpretops.errors import EngineError
from interpretops.plan import ModelSpec
from proxy.engines.fleet import Fleet
from proxy.engines.link import ProvenEngine
from proxy.observe.metrics import Metrics
from proxy.policies.catalogue import Catalogue
from proxy.policies.entry import Entry, ReloadReport
from proxy.policies.policy_files import BrokenPolicyError, DuplicatePolicyError
from proxy.policies.policy_folders import SOURCES, Listing, Source
from proxy.policies.policy_reading import PolicyReading, Read

_COMPOSED: Final = Path("composed policies")
"""Stands for the file that they have not."""
_DELETED: Final = "deleted"
_OF_FILES: Final = ("file", "duplicate")


class Intake:
    """Looks at the files of a folder; their contents, not their times, decide what is new."""

    def __init__(
        self,
        folder: Path,
        artifacts: Path,
        catalogue: Catalogue,
        fleet: Fleet,
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self._folder = folder
        self._reading = PolicyReading(folder, artifacts)
        self._turn = asyncio.Lock()
        """Held while files are read; the catalogue's lock is taken within, never the other way round."""
        self._read_once = False
        self._catalogue = catalogue
        self._fleet = fleet
        self._metrics = metrics
        self._log = log
        self.file_errors: dict[Path, str] = {}
        """Why a file is not what serves, or serves nothing."""
        self._source: dict[Path, Source] = {}
        """Of errors that no policy's own metric shows: what kind of thing it is that is wrong."""
        self._seen: dict[Path, str] = {}
        self._owner: dict[Path, str] = {}
        self._show_sources()

    async def prepare(self, engine: ProvenEngine) -> None:
        """Load everything into an engine that has nothing yet. Raises `EngineError` when it may not join."""
        async with self._catalogue.lock:
            others = [other for other in self._fleet.joined if other is not engine]
            if others:
                _check_alike(engine, others[0])
            if others and self._read_once:
                for revision in self._catalogue.wanted:
                    await self._catalogue.residency.load_into(engine, revision)
                return
        async with self._turn:
            async with self._catalogue.lock:
                if self._catalogue.forget_others(engine.spec.fingerprint):
                    self._seen.clear()
            await self._reload(engine.spec, force=False)

    async def reload(self, *, force: bool = False) -> ReloadReport:
        """Bring in what changed; with ``force``, compile every file again (new dictionaries)."""
        async with self._turn:
            engine = next(iter(self._fleet.joined), None)
            if engine is None:
                raise EngineError("the engine is not ready; policies are loaded when it is")
            return await self._reload(engine.spec, force=force)

    async def restore(self) -> None:
        """Load again what an engine lacks of what serves."""
        async with self._catalogue.lock:
            await self._restore(ReloadReport())

    async def _reload(self, spec: ModelSpec, *, force: bool) -> ReloadReport:
        report = ReloadReport()
        listing = await self._reading.look()
        async with self._catalogue.lock:
            self._check_model(spec)
            await self._take_listing(listing, report)
        for path, digest in (listing.files or {}).items():
            if force or self._seen.get(path) != digest:
                read = await self._reading.compile(spec, path, digest)
                async with self._catalogue.lock:
                    self._check_model(spec)
                    await self._bring_in(read, report, force=force)
        self._read_once = True
        self._show_sources()
        return report

    def _check_model(self, spec: ModelSpec) -> None:
        """Files are read without a lock: meanwhile an engine with another model may have come."""
        if spec.fingerprint not in {engine.spec.fingerprint for engine in self._fleet.joined}:
            raise EngineError("the engine was replaced while policies were read; they are read again")

    async def _take_listing(self, listing: Listing, report: ReloadReport) -> None:
        self._note_hidden(listing, report)
        if listing.files is not None:
            self._forget_deleted(listing, report)
        await self._restore(report)
        for entry in self._catalogue.entries.values():
            if entry.shadow is not None and entry.shadow not in self._catalogue.residency:
                # Lost with an engine; it waits as any candidate until a person casts it again.
                entry.candidate_state = "candidate"
            if entry.candidate is not None and not entry.rolled_back:
                await self._look_at_card(entry, report)

    async def _restore(self, report: ReloadReport) -> None:
        for entry in self._catalogue.entries.values():
            active = entry.active
            if active is None or self._catalogue.residency.everywhere(active):
                continue
            try:
                await self._catalogue.residency.load(active)
            except EngineError as error:
                self._note_failure(report, active.file, entry.policy, f"{active.file}: {error}")
                # What its file is worth is looked at again once the engines take it.
                self._seen.pop(active.file, None)
            else:
                report.loaded.append(active.label)
        if failed := await self._catalogue.compositions.restore():
            why = "; ".join(f"{name}: {error}" for name, error in failed.items())
            self._note_failure(report, _COMPOSED, None, why)
        else:
            self._clear(_COMPOSED)

    async def _bring_in(self, read: Read, report: ReloadReport, *, force: bool) -> None:
        """Make what a file compiled to active."""
        path, digest, fresh = read.path, read.digest, read.result
        former, catalogue = self._owner.get(path), self._catalogue
        try:
            if isinstance(fresh, BrokenPolicyError):
                raise fresh
            self._check_owner(path, fresh.policy)
        except BrokenPolicyError as error:
            self._seen[path] = digest
            if former is None and error.policy is not None and not self._files_of(error.policy):
                self._owner[path] = error.policy
            source: Source = "duplicate" if isinstance(error, DuplicatePolicyError) else "file"
            self._note_failure(report, path, self._owner.get(path), str(error), source)
            return
        self._take_over(path, fresh.policy)
        self._owner[path] = fresh.policy
        entry = catalogue.entries.setdefault(fresh.policy, Entry(fresh.policy))
        held = force and entry.is_held(fresh)
        try:
            if entry.active is not None and entry.active.revision == fresh.revision:
                if not catalogue.residency.everywhere(entry.active):
                    await catalogue.residency.load(entry.active)
                if not entry.rolled_back:
                    catalogue.end_shadow(entry, entry.active)
                    # The file was changed back: what waited is nobody's wish any more.
                    entry.candidate = entry.waits_for = None
            elif not held:
                await catalogue.admit(entry, fresh, report)
        except EngineError as error:
            # Not remembered as seen: the next look tries again.
            self._note_failure(report, path, fresh.policy, f"{path}: {error}")
            return
        finally:
            if former is not None and former != fresh.policy:
                catalogue.remove(former, path, report)
        self._seen[path] = digest
        self._clear(path)
        entry.error = None
        self._metrics.policy_broken.labels(entry.policy).set(0)

    async def _look_at_card(self, entry: Entry, report: ReloadReport) -> None:
        """Serve a candidate whose card has come."""
        waiting = entry.candidate
        assert waiting is not None
        proven, why = await self._catalogue.judge(waiting)
        if not proven:
            entry.waits_for = why
            return
        try:
            await self._catalogue.activate(entry, waiting)
        except EngineError as error:
            self._note_failure(report, waiting.file, entry.policy, f"{waiting.file}: {error}")
        else:
            report.loaded.append(waiting.label)

    def _check_owner(self, path: Path, policy: str) -> None:
        """A policy has one file, and a file's policy is not renamed away while bindings demand it."""
        others = [other for other in self._files_of(policy) if other != path and not self._is_deleted(other)]
        if others:
            raise DuplicatePolicyError(
                None, f"{path}: meta.id = {policy!r}, but {others[0]} has that id already; choose another"
            )
        former = self._owner.get(path, policy)
        if former != policy and former in self._catalogue.demanded:
            raise BrokenPolicyError(
                former, f"{path}: meta.id = {policy!r}, but bindings demand {former!r}; change them first"
            )

    def _files_of(self, policy: str) -> list[Path]:
        return [path for path, owned in self._owner.items() if owned == policy]

    def _is_deleted(self, path: Path) -> bool:
        return self._seen.get(path) == _DELETED

    def _take_over(self, path: Path, policy: str) -> None:
        """Forget the deleted file of a policy that bindings demand: it has another one now."""
        for other in self._files_of(policy):
            if other != path and self._is_deleted(other):
                self._forget(other)

    def _forget(self, path: Path) -> None:
        self._seen.pop(path, None)
        self._owner.pop(path, None)
        self._clear(path)

    def _clear(self, path: Path) -> None:
        self.file_errors.pop(path, None)
        self._source.pop(path, None)

    def _note_hidden(self, listing: Listing, report: ReloadReport) -> None:
        """Folders that cannot be looked into, and those that can again."""
        folders = [
            path for path, source in self._source.items() if source in ("policies", "artifacts", "cards")
        ]
        for path in folders:
            if path not in listing.hidden:
                self._clear(path)
                self._log.info("folder_readable", folder=str(path))
        for path, (source, text) in listing.hidden.items():
            self._note_failure(report, path, None, text, source)

    def _show_sources(self) -> None:
        for source in SOURCES:
            self._metrics.policy_sources_broken.labels(source).set([*self._source.values()].count(source))

    def _forget_deleted(self, listing: Listing, report: ReloadReport) -> None:
        files, forgotten = listing.files or {}, False
        known = {
            *self._seen,
            *self._owner,
            *(path for path, kind in self._source.items() if kind in _OF_FILES),
        }
        for path in sorted(known - files.keys()):
            if listing.hides(path):
                continue
            policy = self._owner.get(path)
            if policy in self._catalogue.demanded:
                text = f"{path}: deleted, but bindings demand {policy!r}; its last revision keeps serving"
                self._note_failure(report, path, policy, text)
                self._seen[path] = _DELETED
                forgotten = True
                continue
            self._forget(path)
            forgotten = True
            if policy is not None:
                self._catalogue.remove(policy, path, report)

        if forgotten:
            # What another file kept from serving may serve now.
            for path in [path for path, source in self._source.items() if source == "duplicate"]:
                self._seen.pop(path, None)

    def _note_failure(
        self,
        report: ReloadReport,
        path: Path,
        policy: str | None,
        text: str,
        source: Source | None = None,
    ) -> None:
        """``source`` tells what is wrong where no policy is known whose metric would show it."""
        report.failed[str(path)] = text
        self._source.pop(path, None)
        if policy is None and source is not None:
            self._source[path] = source
        if policy is not None:
            self._catalogue.entries.setdefault(policy, Entry(policy)).error = text
            self._metrics.policy_broken.labels(policy).set(1)
        if self.file_errors.get(path) != text:
            self.file_errors[path] = text
            self._metrics.reloads.labels("failed").inc()
            self._log.error("policy_refused", policy=policy, file=str(path), error=text)


def _check_alike(engine: ProvenEngine, other: ProvenEngine) -> None:
    """One gateway serves one model: a request must not depend on which engine it meets."""
    if (engine.spec.fingerprint, engine.served) != (other.spec.fingerprint, other.served):
        raise EngineError(
            f"the engine at {engine.name} serves {_model(engine)}, but {other.name} serves {_model(other)}; "
            "one gateway serves one model, under the same names everywhere"
        )
    if engine.special != other.special:
        raise EngineError(
            f"the engine at {engine.name} has other special tokens than {other.name}; one gateway serves one "
            "model, with the same tokenizer everywhere"
        )


def _model(engine: ProvenEngine) -> str:
    return f"{', '.join(sorted(engine.served))} (fingerprint {engine.spec.fingerprint[:12]})"
