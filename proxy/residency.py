"""Which revisions the engine holds, and which requests still need them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from structlog.typing import FilteringBoundLogger

from interpretops.errors import EngineError
from proxy.engine_link import EngineLink, ProvenEngine
from proxy.policy_files import Revision


class Residency:
    """Loads revisions into the engine, and frees each only when no request is under way with it.

    So no request that was accepted under a revision is ever refused by the engine because of a change.
    """

    def __init__(self, link: EngineLink, log: FilteringBoundLogger) -> None:
        self._link = link
        self._log = log
        self._resident: set[str] = set()
        self._retiring: set[str] = set()
        self._pins: Counter[str] = Counter()
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def __contains__(self, revision: Revision) -> bool:
        return revision.revision in self._resident

    def pins(self, revision: Revision) -> int:
        """Requests under way with a revision."""
        return self._pins[revision.revision]

    def forget(self) -> None:
        """The engine is another one now and holds nothing."""
        self._resident.clear()
        self._retiring.clear()

    async def load(self, engine: ProvenEngine, revision: Revision) -> None:
        """Make a revision resident; raises `EngineError` unless every rank attests its numbers."""
        async with self._lock:
            await engine.client.load(revision.revision, revision.plan, revision.digest)
            self._resident.add(revision.revision)
            self._retiring.discard(revision.revision)

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
        """Free a revision as soon as nothing pins it; nobody may pin it anew unless it is loaded again."""
        self._retiring.add(revision.revision)
        if not self._pins[revision.revision]:
            self._free_soon(revision.revision)

    async def close(self) -> None:
        """Give up what is still to be freed: the engine goes, or keeps it for others."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _free_soon(self, name: str) -> None:
        task = asyncio.create_task(self._free(name))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _free(self, name: str) -> None:
        async with self._lock:
            engine = self._link.current
            # It may have been loaded again, and come into use, while we waited.
            if engine is None or name not in self._retiring or self._pins[name]:
                return
            self._retiring.discard(name)
            self._resident.discard(name)
            try:
                await engine.client.retire(name)
            except EngineError as error:
                self._log.warning("retire_failed", revision=name, error=str(error))
