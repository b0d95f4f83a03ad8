"""Brings policy files into the catalogue: compiles what is new, and reloads what an engine has lost."""

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
"""Stands in for their file: they have none."""
_DELETED: Final = "deleted"
_OF_FILES: Final = ("file", "duplicate")


class Intake:
    """Watches the files of a folder. Contents, not timestamps, decide what is new."""

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
        self._reading_lock = asyncio.Lock()
        """Held while files are read. Take it before the catalogue's lock, never after."""
        self._read_once = False
        self._catalogue = catalogue
        self._fleet = fleet
        self._metrics = metrics
        self._log = log
        self.file_errors: dict[Path, str] = {}
        """Why a file's policy is not served."""
        self._source: dict[Path, Source] = {}
        """For errors that no policy's own metric shows: which kind of source is broken."""
        self._seen: dict[Path, str] = {}
        self._owner: dict[Path, str] = {}
        self._show_sources()

    async def prepare(self, engine: ProvenEngine) -> None:
        """Load all revisions into a new engine. Raises `EngineError` when it may not join."""
        async with self._catalogue.lock:
            others = [other for other in self._fleet.joined if other is not engine]
            if others:
                _check_alike(engine, others[0])
            if others and self._read_once:
                for revision in self._catalogue.required_revisions:
                    await self._catalogue.residency.load_into(engine, revision)
                return
        async with self._reading_lock:
            async with self._catalogue.lock:
                if self._catalogue.forget_others(engine.spec.fingerprint):
                    self._seen.clear()
            await self._reload(engine.spec, force=False)

    async def reload(self, *, force: bool = False) -> ReloadReport:
        """Load changed files. With ``force``, compile every file again, for new dictionaries."""
        async with self._reading_lock:
            engine = next(iter(self._fleet.joined), None)
            if engine is None:
                raise EngineError("the engine is not ready; policies will be loaded when it is")
            return await self._reload(engine.spec, force=force)

    async def restore(self) -> None:
        """Reload active revisions that an engine lacks."""
        async with self._catalogue.lock:
            await self._restore(ReloadReport())

    async def _reload(self, spec: ModelSpec, *, force: bool) -> ReloadReport:
        report = ReloadReport()
        listing = await self._reading.scan()
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
        """Files are read without the catalogue's lock, so the engine may have been replaced meanwhile."""
        if spec.fingerprint not in {engine.spec.fingerprint for engine in self._fleet.joined}:
            raise EngineError("the engine was replaced while policies were read; they will be read again")

    async def _take_listing(self, listing: Listing, report: ReloadReport) -> None:
        self._note_hidden(listing, report)
        if listing.files is not None:
            self._forget_deleted(listing, report)
        await self._restore(report)
        for entry in self._catalogue.entries.values():
            if entry.shadow is not None and entry.shadow not in self._catalogue.residency:
                # Lost with an engine. It stays a candidate until an operator starts the shadow again.
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
                # Read its file again once the engines accept the revision.
                self._seen.pop(active.file, None)
            else:
                report.loaded.append(active.label)
        if failed := await self._catalogue.compositions.restore():
            why = "; ".join(f"{name}: {error}" for name, error in failed.items())
            self._note_failure(report, _COMPOSED, None, why)
        else:
            self._clear(_COMPOSED)

    async def _bring_in(self, read: Read, report: ReloadReport, *, force: bool) -> None:
        """Admit the revision that a file compiled to, or record its error."""
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
                    # The file was changed back, so drop the candidate.
                    entry.candidate = entry.waits_for = None
            elif not held:
                await catalogue.admit(entry, fresh, report)
        except EngineError as error:
            # Not marked as seen, so the next reload tries again.
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
        """Activate a candidate whose Risk Card passes now."""
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
        """Each policy has one file, and a file may not drop a policy that bindings require."""
        others = [other for other in self._files_of(policy) if other != path and not self._is_deleted(other)]
        if others:
            raise DuplicatePolicyError(
                None, f"{path}: meta.id = {policy!r}, but {others[0]} already has that id; choose another"
            )
        former = self._owner.get(path, policy)
        if former != policy and former in self._catalogue.required:
            raise BrokenPolicyError(
                former, f"{path}: meta.id = {policy!r}, but bindings require {former!r}; change them first"
            )

    def _files_of(self, policy: str) -> list[Path]:
        return [path for path, owned in self._owner.items() if owned == policy]

    def _is_deleted(self, path: Path) -> bool:
        return self._seen.get(path) == _DELETED

    def _take_over(self, path: Path, policy: str) -> None:
        """Forget a required policy's deleted file: another file now defines the policy."""
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
        """Record folders that cannot be read, and those that can be read again."""
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
            if policy in self._catalogue.required:
                text = f"{path}: deleted, but bindings require {policy!r}; its last revision keeps serving"
                self._note_failure(report, path, policy, text)
                self._seen[path] = _DELETED
                forgotten = True
                continue
            self._forget(path)
            forgotten = True
            if policy is not None:
                self._catalogue.remove(policy, path, report)

        if forgotten:
            # Files refused as duplicates may be valid now.
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
        """``source``: which source is broken, for errors that belong to no known policy."""
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
    """All engines must serve the same model: a request must not depend on which one answers it."""
    if (engine.spec.fingerprint, engine.served) != (other.spec.fingerprint, other.served):
        raise EngineError(
            f"the engine at {engine.name} serves {_model(engine)}, but {other.name} serves {_model(other)}; "
            "all engines of a gateway must serve one model, under the same names"
        )
    if engine.special != other.special:
        raise EngineError(
            f"the engine at {engine.name} has other special tokens than {other.name}; all engines of a "
            "gateway must use the same tokenizer"
        )


def _model(engine: ProvenEngine) -> str:
    return f"{', '.join(sorted(engine.served))} (fingerprint {engine.spec.fingerprint[:12]})"
