"""Gates: decide during the forward pass on which tokens a revision's edits may act."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steering_kernels.ops.prompt_memory import (
    ProbeHeads,
    answer_readings,
    prompt_reading,
    store_answer,
    store_readings,
)
from steering_kernels.ops.ranks import SumRanks, norm, project
from steering_kernels.ops.step import NEVER, StepMap


@dataclass(frozen=True, eq=False)
class GateView:
    """One gate of one row, in the form the op evaluates. Field meanings: `interpretops.plan.Gate`."""

    row: int
    index: int
    """Its column of ``StepMap.gate_open``; the row's units refer to it."""
    read: Tensor
    """[C, D] float64. With C = 0 it fires at every token"""
    bias: Tensor
    """[C] float64"""
    cut: Tensor
    """[C] float64"""
    require_all: bool
    prompt_end: bool
    latched: bool
    phase: str
    max_norm: float
    probe: ProbeHeads | None = None
    """Heads of an attention probe, which replaces the conditions and decides at the end of the prompt."""
    refusal: bool = False
    """Whether an open gate means a refusal, noted in ``StepMap.refused``."""
    answer: bool = False
    """The probe decides at generated tokens instead."""
    beside: int | None = None
    """Index of the prompt gate whose reading, times `prompt_weight`, is added to the answer's."""
    prompt_weight: float = 0.0
    sum_ranks: SumRanks | None = None
    """Set if this rank holds only part of the activation's columns; `read` has the same part."""


def phase_mask(phase: str, position: Tensor, prompt_length: Tensor) -> Tensor | None:
    """Mask of the tokens in a phase; None means all tokens.

    The last prompt token is in both phases: it is part of the prompt, and yields the first generated token.
    """
    if phase == "prefill":
        return position < prompt_length
    if phase == "decode":
        return position >= prompt_length - 1
    return None


def update_gates(x: Tensor, gates: list[GateView], step: StepMap) -> None:
    """Evaluate the gates that read at this site, and set their columns of ``step.gate_open``.

    x  [T, D] the site's activation before any edit; not changed.

    A latched gate records the first position at which it fired in ``step.fired_at``.
    """
    for gate in gates:
        if gate.row not in step.rows:
            continue
        if gate.probe is not None:
            _store(x, gate, gate.probe, step)
            if not gate.probe.summed:
                continue
        index = step.tokens_of(gate.row)
        position, prompt_length = step.position, step.prompt_length
        if index is not None:
            position, prompt_length = position[index], prompt_length[index]
        scored = step.ends_prompt or not gate.prompt_end
        if not scored and not gate.latched:
            continue  # stays closed, the initial state
        fires = _fires(x, index, position, gate, step) if scored else position < 0
        if gate.prompt_end and scored:
            fires &= position == prompt_length - 1
        if gate.latched:
            slot = step.slot_of_token if index is None else step.slot_of_token[index]
            column = step.fired_at[:, gate.index]
            if scored:
                column.scatter_reduce_(0, slot, torch.where(fires, position, NEVER), "amin")
            fires = position >= column[slot]
        mask = phase_mask(gate.phase, position, prompt_length)
        if mask is not None:
            fires = fires & mask
        if index is None:
            step.gate_open[:, gate.index] = fires
        else:
            step.gate_open[index, gate.index] = fires
        # Receipts do not count a gate that only tests the phase.
        if gate.probe is not None or gate.read.shape[0] > 0:
            slots = step.slot_of_token if index is None else step.slot_of_token[index]
            step.opened.index_add_(0, slots, fires.long())
            if gate.refusal:  # the next token of the answer is generated from these
                refuses = fires & (position >= prompt_length - 1)
                step.refused.scatter_reduce_(0, slots, refuses.long() * gate.index, "amax")


def _fires(x: Tensor, index: Tensor | None, position: Tensor, gate: GateView, step: StepMap) -> Tensor:
    """Whether the gate's condition holds at each token ``index`` of x [T, D].

    Tokens above the norm bound are not read. If the end of the prompt, the only token that a gate reads, is
    above it, the gate opens: a guard that cannot read must not let the request pass. The exception is the
    first token of a request, which is always a sink.
    """
    if gate.probe is not None:
        return _probed(x, index, gate, gate.probe, step)
    x = x if index is None else x[index]
    if gate.read.shape[0] == 0:
        return torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    wide = x.double()
    above = project(wide, gate.read.t(), gate.bias, gate.sum_ranks) > gate.cut
    fires = above.all(dim=1) if gate.require_all else above.any(dim=1)
    if gate.max_norm != float("inf"):
        unread = norm(wide, gate.sum_ranks) > gate.max_norm
        fires = fires & ~unread
        if gate.prompt_end:
            fires |= unread & (position > 0)
    return fires


def _store(x: Tensor, gate: GateView, heads: ProbeHeads, step: StepMap) -> None:
    parts = [part for part in step.prompts if part.row == gate.row]
    answer = step.answers.get(gate.row)
    if (parts or answer is not None) and step.memory is None:
        raise RuntimeError("a gate reads whole prompts or answers, but this engine has no prompt memory")
    if step.memory is None:
        return
    if not gate.answer:
        store_readings(x, heads, parts, step.memory)
    elif answer is not None:
        store_answer(x, heads, answer, step.memory)


def _probed(x: Tensor, index: Tensor | None, gate: GateView, heads: ProbeHeads, step: StepMap) -> Tensor:
    fires = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    for part in step.prompts:
        if not gate.answer and part.row == gate.row and part.ends and step.memory is not None:
            reading, last = prompt_reading(heads, part, step.memory), part.first + part.count - 1
            fires[last] = ~(reading <= gate.cut).all()
            step.prompt_reading[step.slot_of_token[last], gate.index] = reading
    answer = step.answers.get(gate.row)
    if gate.answer and answer is not None and step.memory is not None:
        readings = answer_readings(heads, answer, step.memory)
        if gate.beside is not None:
            slots = step.slot_of_token[answer.index]
            readings = readings + gate.prompt_weight * step.prompt_reading[slots, gate.beside]
        fires[answer.index] = ~(readings <= gate.cut)
    return fires if index is None else fires[index]
