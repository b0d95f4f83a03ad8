"""Runs a waiting revision beside the active one on a share of traffic, unseen, and counts differences."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from interpretops.engine_api import Receipt
from interpretops.errors import EngineError
from proxy.engines.link import ProvenEngine
from proxy.observe.metrics import Metrics
from proxy.observe.request_context import Trail
from proxy.observe.supervisor import Supervisor
from proxy.openai_api.routes import Route
from proxy.policies.policy_files import Revision
from proxy.policies.residency import Residency
from proxy.verification.internal_request import ask

_AT_A_TIME: Final = 4
"""Shadows in progress; a request beyond that is not repeated, so that shadows never queue before answers."""
_MALFORMED: Final = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""What reading an answer raises that has not the shape it should have."""


@dataclass
class Tally:
    """What shadows of one revision found so far."""

    revision: str
    requests: dict[str, int] = field(default_factory=dict)
    """By result: `same` or `changed` text, `uncompared` (sampled or streamed), `failed`."""
    edits: list[int] = field(default_factory=lambda: [0, 0])
    """Edits of the active revision and of the shadow, on the same requests."""
    gates: list[int] = field(default_factory=lambda: [0, 0])
    """The same of conditional gates that were open."""

    def shown(self) -> dict[str, Any]:
        """For operators."""
        return {
            "revision": self.revision,
            "requests": self.requests,
            "edits": {"active": self.edits[0], "shadow": self.edits[1]},
            "gates": {"active": self.gates[0], "shadow": self.gates[1]},
        }


class Shadows:
    """Repeats sampled requests under waiting revisions. Their answers go nowhere."""

    def __init__(
        self,
        share: float,
        residency: Residency,
        timeout_s: float,
        metrics: Metrics,
        log: FilteringBoundLogger,
        supervisor: Supervisor,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._share = share
        self._residency = residency
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._log = log
        self._supervisor = supervisor
        self._draw = draw
        self._tasks: set[asyncio.Task[None]] = set()
        self.tallies: dict[str, Tally] = {}

    def wanted(self, revision: Revision | None) -> bool:
        """Whether a request that is about to run is to be repeated."""
        return revision is not None and len(self._tasks) < _AT_A_TIME and self._draw() < self._share

    def repeat(
        self, engine: ProvenEngine, route: Route, body: Mapping[str, Any], revision: Revision, trail: Trail
    ) -> None:
        """Run a request once more, now that its own answer has been sent, if the same engine can."""
        if revision.revision not in engine.resident:
            return
        task = self._supervisor.spawn("shadow", self._repeat(engine, route, dict(body), revision, trail))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Give up what is running."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _repeat(
        self, engine: ProvenEngine, route: Route, body: dict[str, Any], revision: Revision, trail: Trail
    ) -> None:
        for name in ("stream", "stream_options"):
            body.pop(name, None)
        result, receipt = "failed", None
        try:
            with self._residency.pin(revision):
                answer, receipt = await ask(engine, route, body, revision.revision, self._timeout_s)
            result = _compare(body, trail.answer, answer)
        except (EngineError, OSError, TimeoutError, *_MALFORMED) as error:
            self._log.info("shadow_failed", policy=revision.policy, kind=type(error).__name__)
        finally:
            self._count(revision, result, trail, receipt)

    def _count(self, revision: Revision, result: str, trail: Trail, receipt: Receipt | None) -> None:
        tally = self.tallies.get(revision.policy)
        if tally is None or tally.revision != revision.revision:
            tally = self.tallies[revision.policy] = Tally(revision.revision)
        tally.requests[result] = tally.requests.get(result, 0) + 1
        self._metrics.shadow_requests.labels(revision.policy, result).inc()
        if receipt is not None:
            for both, mine, theirs in (
                (tally.edits, trail.edits, receipt.edits_applied),
                (tally.gates, trail.gates, receipt.gates_fired),
            ):
                both[0] += mine
                both[1] += theirs


def _compare(body: Mapping[str, Any], given: bytes | None, shadow: bytes) -> str:
    """Whether two answers say the same; only where chance plays no part and the first was kept."""
    if given is None or body.get("temperature") != 0:
        return "uncompared"
    return "same" if _said(given) == _said(shadow) else "changed"


def _said(answer: bytes) -> Any:
    """What of an answer is the model's, without ids and times."""
    content = json.loads(answer)
    return [content.get(name) for name in ("choices", "content")] + [
        item.get("content") for item in content.get("output") or ()
    ]
