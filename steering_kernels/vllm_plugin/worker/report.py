"""A worker's reports per request. They reach the front end attached to outputs that vLLM sends anyway."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ATTRIBUTE = "interpretops_reports"
OUTPUT_KEY = "interpretops"


@dataclass(frozen=True)
class Report:
    """What was done for one request, cumulative since its start."""

    revision: str | None
    nonce: str
    tokens_evaluated: int
    """Tokens that passed through the model for this request; recomputed tokens count again."""
    edits_applied: int
    """(token, site) pairs edited."""
    gates_fired: int
    """(token, gate) pairs at which a conditional gate was open."""
    cached_tokens: int
    """Tokens whose keys and values came from the prefix cache."""
    refusal_gate: int = 0
    """The plan's refusal gate that was open where the answer is generated; 0 if none was."""


class StepReports:
    """The reports of a pass. Their counts are copied asynchronously and awaited only in `take`."""

    def __init__(self, requests: Sequence[tuple[str, Report, int]], counts: Sequence[Tensor]) -> None:
        """``requests``: id, report with zero counts, and index of its counts in each of ``counts`` [S]."""
        self._requests = requests
        self._counts = torch.stack(list(counts)) if counts else None
        self._ready = None
        if self._counts is not None and self._counts.is_cuda:
            host = torch.empty(self._counts.shape, dtype=self._counts.dtype, pin_memory=True)
            self._counts = host.copy_(self._counts, non_blocking=True)
            self._ready = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._ready.record()

    def __bool__(self) -> bool:
        return bool(self._requests)

    def take(self) -> dict[str, list[Any]]:
        """Every report as a list, by request id. Waits for the device."""
        if self._ready is not None:
            self._ready.synchronize()
        edited, opened, refused = ([], [], []) if self._counts is None else self._counts.tolist()
        return {
            request: [
                report.revision,
                report.nonce,
                report.tokens_evaluated,
                edited[slot] if edited else 0,
                opened[slot] if opened else 0,
                report.cached_tokens,
                refused[slot] if refused else 0,
            ]
            for request, report, slot in self._requests
        }


def attach_reports(output: Any, reports: StepReports) -> Any:
    """Attach reports to a runner's output, whether it is ready or still being copied from the device."""
    from vllm.v1.outputs import ModelRunnerOutput

    if not reports or output is None:
        return output
    if isinstance(output, ModelRunnerOutput):
        setattr(output, ATTRIBUTE, reports.take())
        return output
    get_output = output.get_output

    def with_reports() -> Any:
        ready = get_output()
        setattr(ready, ATTRIBUTE, reports.take())
        return ready

    output.get_output = with_reports
    return output


def refusal_gates(model_runner_output: Any) -> dict[str, int]:
    """In the engine core: the open refusal gate of each request of this step that has one."""
    reports = getattr(model_runner_output, ATTRIBUTE, None) or {}
    return {request: Report(*values).refusal_gate for request, values in reports.items() if values[-1]}


def move_to_outputs(model_runner_output: Any, outputs_by_client: dict[int, Any]) -> None:
    """In the engine core: move each request's report to its output of this step."""
    reports = getattr(model_runner_output, ATTRIBUTE, None)
    if not reports:
        return
    for outputs in outputs_by_client.values():
        for output in outputs.outputs:
            report = reports.get(output.request_id)
            if report is not None:
                output.kv_transfer_params = {OUTPUT_KEY: report}


def take_report(output: Any) -> Report | None:
    """In the front end: remove and return the report of an output, so that the answer is unchanged."""
    params = output.kv_transfer_params
    if not params or OUTPUT_KEY not in params:
        return None
    output.kv_transfer_params = None
    return Report(*params[OUTPUT_KEY])
