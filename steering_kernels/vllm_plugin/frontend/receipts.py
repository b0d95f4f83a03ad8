"""Receipts in the front end: the engine's figures per request, kept by nonce until they are taken."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from typing import Any

from interpretops.engine_api import PASS_THROUGH, Receipt
from steering_kernels.vllm_plugin.core.refusal_stop import refusal_of
from steering_kernels.vllm_plugin.core.refusals import take_refusal
from steering_kernels.vllm_plugin.worker.report import Report, take_report

CAPACITY = 16_384


class Receipts:
    """The latest report of each engine request of a nonce (several if a client asks for ``n`` choices)."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._by_nonce: OrderedDict[str, dict[str, Report]] = OrderedDict()
        self._ended: dict[str, set[str]] = {}
        """The engine requests of a nonce that have ended, in the core or because a stop string was found."""
        self._refusals: dict[str, str] = {}
        """The text of the newest request of a nonce that was stopped because its refusal gate opened."""

    def record(self, request_id: str, report: Report) -> None:
        """Store a request's newest report; drops the oldest nonces beyond the capacity."""
        self._by_nonce.setdefault(report.nonce, {})[request_id] = report
        self._by_nonce.move_to_end(report.nonce)
        while len(self._by_nonce) > self._capacity:
            forgotten, _ = self._by_nonce.popitem(last=False)
            self._ended.pop(forgotten, None)
            self._refusals.pop(forgotten, None)

    def refuse(self, nonce: str, text: str) -> None:
        """Note that a request with a report was stopped by a refusal gate, and what clients get instead."""
        if nonce in self._by_nonce:
            self._refusals[nonce] = text

    def refusal(self, nonce: str) -> str | None:
        """The text for a nonce with a request that a refusal gate stopped; None if there is none."""
        return self._refusals.get(nonce)

    def end(self, request_id: str, nonce: str) -> None:
        """Mark a request with a report as ended: it gets no further tokens."""
        if nonce in self._by_nonce:
            self._ended.setdefault(nonce, set()).add(request_id)

    def knows(self, nonce: str) -> bool:
        """Whether there is any report for a nonce."""
        return nonce in self._by_nonce

    def take(self, nonce: str) -> Receipt | None:
        """Remove and return the receipt of a nonce, summed over its requests; None if there is none."""
        by_request, ended = self._by_nonce.pop(nonce, {}), self._ended.pop(nonce, set())
        self._refusals.pop(nonce, None)
        reports = list(by_request.values())
        if not reports:
            return None
        revisions = {report.revision for report in reports}
        if len(revisions) != 1:
            return Receipt(revision="mixed", requests=len(reports), tokens_evaluated=0, finished=False)
        return Receipt(
            revision=reports[0].revision or PASS_THROUGH,
            requests=len(reports),
            tokens_evaluated=sum(report.tokens_evaluated for report in reports),
            edits_applied=sum(report.edits_applied for report in reports),
            gates_fired=sum(report.gates_fired for report in reports),
            cached_tokens=sum(report.cached_tokens for report in reports),
            refusals=sum(report.refusal_gate > 0 for report in reports),
            finished=ended >= by_request.keys(),
        )


RECEIPTS = Receipts()
"""The receipts of this front-end process; filled where vLLM turns engine outputs into answers."""


def collect(outputs: list[Any]) -> list[tuple[str, str]]:
    """Remove the reports from the engine core's outputs; returns (request id, nonce) of each, in order."""
    found: list[tuple[str, str]] = []
    for output in outputs:
        take_refusal(output)
        report = take_report(output)
        if report is not None:
            RECEIPTS.record(output.request_id, report)
            if (text := refusal_of(output.stop_reason, report.nonce)) is not None:
                RECEIPTS.refuse(report.nonce, text)
            found.append((output.request_id, report.nonce))
    return found


def mark_ended(reported: list[tuple[str, str]], running: Container[str]) -> None:
    """After outputs became answers: mark the requests that the front end no longer tracks as ended.

    Stop strings are found in the front end, in the text, so the core's output does not show that the request
    ends.
    """
    for request_id, nonce in reported:
        if request_id not in running:
            RECEIPTS.end(request_id, nonce)
