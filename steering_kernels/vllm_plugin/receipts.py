"""Receipts in the front end: what the engine says it did, by nonce, until the gateway asks for it."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from steering_kernels.vllm_plugin.report import Report, take_report

CAPACITY = 16_384


class Receipts:
    """Latest report of every engine request of a nonce (several when a client asks for ``n`` choices)."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._by_nonce: OrderedDict[str, dict[str, Report]] = OrderedDict()

    def record(self, request_id: str, report: Report) -> None:
        """Keep a request's newest report; the oldest nonces are forgotten when there are too many."""
        self._by_nonce.setdefault(report.nonce, {})[request_id] = report
        self._by_nonce.move_to_end(report.nonce)
        while len(self._by_nonce) > self._capacity:
            self._by_nonce.popitem(last=False)

    def take(self, nonce: str) -> dict[str, Any] | None:
        """The receipt of a nonce, summed over its requests; it can be had once. None if nothing is known."""
        reports = list(self._by_nonce.pop(nonce, {}).values())
        if not reports:
            return None
        revisions = {report.revision for report in reports}
        if len(revisions) != 1:
            return {"revision": "mixed", "requests": len(reports), "finished": False}
        return {
            "revision": reports[0].revision or "none",
            "requests": len(reports),
            "tokens_evaluated": sum(report.tokens_evaluated for report in reports),
            "edits_applied": sum(report.edits_applied for report in reports),
            "gates_fired": sum(report.gates_fired for report in reports),
            "cached_tokens": sum(report.cached_tokens for report in reports),
            "finished": True,
        }


RECEIPTS = Receipts()
"""The front end process's own; filled where vLLM turns engine outputs into answers."""


def collect(outputs: list[Any]) -> None:
    """Take the reports off the engine core's outputs."""
    for output in outputs:
        report = take_report(output)
        if report is not None:
            RECEIPTS.record(output.request_id, report)
