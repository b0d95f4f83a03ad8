"""Tracks which revisions the engines hold, and which requests still need them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from structlog.typing import FilteringBoundLogger

from interpretops.engine_api import EngineCode
from interpretops.errors import EngineError
from proxy.engines.client import EngineRefusedError
from proxy.engines.fleet import Fleet
from proxy.engines.link import ProvenEngine
from proxy.observe.metrics import Metrics
from proxy.observe.supervisor import Supervisor
from proxy.policies.policy_files import Revision

_PLAN_ERRORS: Final = frozenset((EngineCode.INVALID_PLAN, EngineCode.PLAN_TOO_LARGE, EngineCode.TABLE_FULL))
"""Refusals by a healthy engine that cannot accept this plan."""


class Residency:
    """Loads revisions into all engines, and frees each one only when no request uses it.

    So a policy change never makes an engine refuse a request that was already accepted.
    """

    def __init__(
        self, fleet: Fleet, metrics: Metrics, log: FilteringBoundLogger, supervisor: Supervisor
    ) -> None:
        self._fleet = fleet
        self._supervisor = supervisor
        self._metrics = metrics
        self._log = log
        self._retiring: set[str] = set()
        self._pins: Counter[str] = Counter()
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, revision: Revision) -> bool:
        """Whether an engine that takes requests holds it."""
        return any(revision.revision in engine.resident for engine in self._fleet.open)

    def everywhere(self, revision: Revision) -> bool:
        """Whether every engine holds it."""
        return all(revision.revision in engine.resident for engine in self._fleet.joined)

    def pins(self, revision: Revision) -> int:
        """Number of requests in progress under a revision."""
        return self._pins[revision.revision]

    async def load(self, revision: Revision) -> None:
        """Make a revision resident on every healthy engine, or on none.

        Skips engines that do not answer or attest another digest; they get no requests of this revision.
        Raises `EngineError` when no engine attests it, or a healthy engine cannot accept it.
        """
        name = revision.revision
        async with self._lock:
            engines = self._fleet.joined
            if not engines:
                raise EngineError("the engine is not ready; policies will be loaded when it is")
            lacking = [engine for engine in engines if name not in engine.resident]
            results = await asyncio.gather(
                *(self._try(engine, revision) for engine in lacking), return_exceptions=True
            )
            faults = {
                engine.name: error
                for engine, error in zip(lacking, results, strict=True)
                if error is not None
            }
            refused = [error for error in faults.values() if not _is_engine_fault(error)]
            if refused or len(faults) == len(engines):
                for engine in lacking:
                    await self._retire(engine, name)
                self._free_leftovers_soon()
                raise (refused or list(faults.values()))[0]
            self._retiring.discard(name)
        self._free_leftovers_soon()
        for engine_name, error in faults.items():
            self._note_unattested(engine_name, revision, error)

    async def load_into(self, engine: ProvenEngine, revision: Revision) -> None:
        """Make a revision resident on an engine that is joining.

        A healthy engine that cannot accept this plan joins without it and gets no requests of it, so that it
        can still serve its other plans. Raises `EngineError` for all other failures.
        """
        async with self._lock:
            error = await self._try(engine, revision)
            if error is not None and _is_engine_fault(error):
                raise error
        # It may still hold plans from before the connection was lost.
        self._free_leftovers_soon()
        if error is not None:
            self._note_unattested(engine.name, revision, error)

    @contextmanager
    def pin(self, revision: Revision) -> Iterator[Revision]:
        """Keep a revision resident until the block ends."""
        name = revision.revision
        self._pins[name] += 1
        try:
            yield revision
        finally:
            self._pins[name] -= 1
            if not self._pins[name]:
                del self._pins[name]
                if name in self._retiring:
                    self._free_soon(name)

    def retire(self, revision: Revision) -> None:
        """Free a revision once nothing pins it. It must be loaded again before it is pinned again."""
        self._retiring.add(revision.revision)
        if not self._pins[revision.revision]:
            self._free_soon(revision.revision)

    async def close(self) -> None:
        """Cancel pending frees: the engine is stopping, or keeps the plans for other gateways."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _note_unattested(self, engine: str, revision: Revision, error: BaseException) -> None:
        self._metrics.engine_unattested.labels(engine).inc()
        self._log.error("revision_not_attested", engine=engine, revision=revision.revision, error=str(error))

    async def _try(self, engine: ProvenEngine, revision: Revision) -> EngineError | None:
        try:
            await engine.client.load(revision.revision, revision.plan, revision.digest)
        except EngineError as error:
            if not isinstance(error, EngineRefusedError):
                # The engine may have loaded it anyway.
                engine.unfreed.add(revision.revision)
            return error
        engine.unfreed.discard(revision.revision)
        engine.resident[revision.revision] = revision.digest
        return None

    def _free_soon(self, name: str) -> None:
        task = self._supervisor.spawn("free revision", self._free(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _free(self, name: str) -> None:
        async with self._lock:
            # It may have been loaded again, and be in use, since we started waiting.
            if name not in self._retiring or self._pins[name]:
                return
            self._retiring.discard(name)
            await asyncio.gather(*(self._retire(engine, name) for engine in self._fleet.joined))

    async def _retire(self, engine: ProvenEngine, name: str) -> None:
        if engine.resident.pop(name, None) is None:
            return
        try:
            await engine.client.retire(name)
        except EngineError as error:
            # Tried again when the next revision is loaded.
            engine.unfreed.add(name)
            self._log.warning("retire_failed", revision=name, error=str(error))

    def _free_leftovers_soon(self) -> None:
        if not any(engine.unfreed for engine in self._fleet.joined):
            return
        task = self._supervisor.spawn("free revision", self._free_leftovers_now())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _free_leftovers_now(self) -> None:
        async with self._lock:
            await self._free_leftovers(self._fleet.joined)

    async def _free_leftovers(self, engines: list[ProvenEngine]) -> None:
        """Free plans that engines may hold although no request needs them."""
        for engine in engines:
            for name in sorted(engine.unfreed):
                if name not in engine.resident:
                    try:
                        await engine.client.retire(name)
                    except EngineError:
                        break
                engine.unfreed.discard(name)


def _is_engine_fault(error: BaseException) -> bool:
    """Whether the engine, not the plan, is at fault, so that other engines may accept the plan."""
    known = isinstance(error, EngineError)
    return known and not (isinstance(error, EngineRefusedError) and error.reason in _PLAN_ERRORS)
