"""Runs a candidate revision in shadow on a share of live traffic, and counts how its answers differ."""

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
from proxy.observe.request_context import RequestContext
from proxy.observe.supervisor import Supervisor
from proxy.openai_api.routes import Route
from proxy.policies.policy_files import Revision
from proxy.policies.residency import Residency
from proxy.verification.internal_request import ask

_AT_A_TIME: Final = 4
"""Most shadow requests in progress. Further requests are not repeated: shadows must never delay answers."""
_MALFORMED: Final = (ValueError, TypeError, AttributeError, LookupError, RecursionError)
"""Exceptions raised when parsing a malformed answer."""


@dataclass
class Tally:
    """Results of one shadow revision so far."""

    revision: str
    requests: dict[str, int] = field(default_factory=dict)
    """By result: `same` or `changed` text, `uncompared` (sampled or streamed), `failed`."""
    edits: list[int] = field(default_factory=lambda: [0, 0])
    """Edits of the active revision and of the shadow, on the same requests."""
    gates: list[int] = field(default_factory=lambda: [0, 0])
    """Openings of conditional gates, likewise."""
    refusals: list[int] = field(default_factory=lambda: [0, 0])
    """Answers in which a refusal gate was open, likewise."""

    def summary(self) -> dict[str, Any]:
        """For the admin API."""
        return {
            "revision": self.revision,
            "requests": self.requests,
            "edits": {"active": self.edits[0], "shadow": self.edits[1]},
            "gates": {"active": self.gates[0], "shadow": self.gates[1]},
            "refusals": {"active": self.refusals[0], "shadow": self.refusals[1]},
        }


class Shadows:
    """Repeats sampled requests under candidate revisions. No caller sees these answers."""

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

    def should_run(self, revision: Revision | None) -> bool:
        """Whether to repeat a request that is about to run."""
        return revision is not None and len(self._tasks) < _AT_A_TIME and self._draw() < self._share

    def repeat(
        self,
        engine: ProvenEngine,
        route: Route,
        body: Mapping[str, Any],
        revision: Revision,
        context: RequestContext,
    ) -> None:
        """Repeat an answered request under ``revision``, if the same engine holds it."""
        if revision.revision not in engine.resident:
            return
        task = self._supervisor.spawn("shadow", self._repeat(engine, route, dict(body), revision, context))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Cancel the shadow requests in progress."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _repeat(
        self,
        engine: ProvenEngine,
        route: Route,
        body: dict[str, Any],
        revision: Revision,
        context: RequestContext,
    ) -> None:
        for name in ("stream", "stream_options"):
            body.pop(name, None)
        result, receipt = "failed", None
        try:
            with self._residency.pin(revision):
                answer, receipt = await ask(engine, route, body, revision.revision, self._timeout_s)
            result = _compare(body, context.answer, answer)
        except (EngineError, OSError, TimeoutError, *_MALFORMED) as error:
            self._log.info("shadow_failed", policy=revision.policy, kind=type(error).__name__)
        finally:
            self._count(revision, result, context, receipt)

    def _count(
        self, revision: Revision, result: str, context: RequestContext, receipt: Receipt | None
    ) -> None:
        tally = self.tallies.get(revision.policy)
        if tally is None or tally.revision != revision.revision:
            tally = self.tallies[revision.policy] = Tally(revision.revision)
        tally.requests[result] = tally.requests.get(result, 0) + 1
        self._metrics.shadow_requests.labels(revision.policy, result).inc()
        if receipt is not None:
            for both, mine, theirs in (
                (tally.edits, context.edits, receipt.edits_applied),
                (tally.gates, context.gates, receipt.gates_fired),
                (tally.refusals, context.refusals, receipt.refusals),
            ):
                both[0] += mine
                both[1] += theirs


def _compare(body: Mapping[str, Any], given: bytes | None, shadow: bytes) -> str:
    """Compare two answers: `same`, `changed`, or `uncompared` if sampled or if the first was not kept."""
    if given is None or body.get("temperature") != 0:
        return "uncompared"
    return "same" if _generated_content(given) == _generated_content(shadow) else "changed"


def _generated_content(answer: bytes) -> Any:
    """The generated content of an answer, without ids and times."""
    content = json.loads(answer)
    return [content.get(name) for name in ("choices", "content")] + [
        item.get("content") for item in content.get("output") or ()
    ]
