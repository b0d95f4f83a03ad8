"""Memory for gates that read a whole prompt: their readings at each token, stored per KV-cache slot.

A prompt may reach the engine in several passes, and part of it may come from the prefix cache and never be
computed again. So what an attention probe needs of a token, a score and a value per head, is stored under the
slot of the token's keys and values: it lives exactly as long as they do, and belongs to the revision of their
cache salt. A slot is emptied before another request gets it (`empty_slots`). For such revisions answers do
not stay in the prefix cache (`interpretops.plan.reach`): the probe does not read them while they are
generated, so a later turn that reused their blocks would lack the readings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

MEMORY_COLUMNS = 256
"""Numbers stored per token: two for each head of a row's attention probes."""


Count = TypeVar("Count", int, Tensor)


@dataclass(frozen=True, eq=False)
class PromptPart:
    """The prompt tokens of one request in a pass."""

    row: int
    first: int
    """Index of the first of them in the pass."""
    slots: Tensor
    """[P] int64, slots of the prompt's tokens from position 0 to the last in this pass"""
    count: int
    """How many of these tokens are in this pass: the last ones."""
    ends: bool
    """Whether the prompt ends in this pass."""


@dataclass(frozen=True, eq=False)
class AnswerTokens:
    """The generated tokens of a pass whose row has a gate of scope `answer`."""

    row: int
    index: Tensor
    """[N] int64, their indices in the pass"""
    slots: Tensor
    """[N, W] int64: slots of the last W tokens of the answer up to each of them, itself last"""
    present: Tensor
    """[N, W] bool: False before the answer's first token"""


@dataclass(frozen=True, eq=False)
class ProbeHeads:
    """The heads of an attention probe at one site, and the columns that store their readings.

    Formula: `interpretops.plan.Gate`.
    """

    query: Tensor
    """[H, D] float64, as `read`"""
    read: Tensor
    bias: Tensor
    """[H]"""
    max_norm: float
    column: int
    """First of their 2 H columns in the memory."""
    summed: tuple[tuple[int, int], ...] = ()
    """(column, number of heads) of this site and earlier ones, whose sum decides here; empty if another site
    decides."""
    window: int | None = None
    """Tokens of the windows of which the largest reading decides; None: the whole prompt is one. For scope
    `answer`: of the one window that ends at a token."""


def max_unread_tokens(tokens: Count) -> Count:
    """Most tokens of a prompt that a gate may skip for their norm. With more, it opens.

    A prompt starts with a sink, and a few more are normal (measured: docs/engine-integration.md).
    """
    return 4 + tokens // 16


def new_memory(slots: int, device: torch.device) -> Tensor:
    """[slots, MEMORY_COLUMNS] float32, all NaN: a reading over a slot that was never written is NaN."""
    return torch.full((slots, MEMORY_COLUMNS), torch.nan, device=device)


def empty_slots(memory: Tensor, blocks: Tensor, block_size: int) -> None:
    """Erase readings of earlier owners in blocks [B] int64 of ``block_size`` slots each."""
    slots = (blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)).flatten()
    memory.index_fill_(0, slots, torch.nan)


def store_readings(x: Tensor, heads: ProbeHeads, parts: list[PromptPart], memory: Tensor) -> None:
    """Store a probe's readings at the prompt tokens of a pass.

    x       [T, D] the pass's activations at the heads' site
    parts   the prompts of the probe's row
    memory  written at the slots of these tokens
    """
    for part in parts:
        _store(x[part.first : part.first + part.count], heads, part.slots[-part.count :], memory)


def store_answer(x: Tensor, heads: ProbeHeads, answer: AnswerTokens, memory: Tensor) -> None:
    """As `store_readings`, for generated tokens."""
    _store(x[answer.index], heads, answer.slots[:, -1], memory)


def _store(x: Tensor, heads: ProbeHeads, slots: Tensor, memory: Tensor) -> None:
    wide = x.double()
    score = wide @ heads.query.t()
    value = torch.addmm(heads.bias, wide, heads.read.t())
    if heads.max_norm != float("inf"):
        score = score.masked_fill((wide.norm(dim=1) > heads.max_norm)[:, None], -torch.inf)
    columns = slice(heads.column, heads.column + 2 * len(heads.bias))
    memory[slots, columns] = torch.cat([score, value], dim=1).float()


def window_readings(score: Tensor, value: Tensor, window: int | None) -> Tensor:
    """One part's readings over the windows of a prompt, in float64.

    score    [T, H] of each token and head; -inf at all heads of a token that is not read
    value    [T, H]
    window   tokens of a window; None, or at least T: the whole prompt is one

    Returns [N]: each window's ``sum_h sum_t softmax_t(score) value``. Windows start at every max(1, window //
    4)th token, and the last one ends at the last token. A window without a token that is read gives 0.
    """
    score, value = score.double(), value.double()
    tokens = len(score)
    if window is None or tokens <= window:
        return _attended(score, value)[None]
    step = max(1, window // 4)
    unread = (score == -torch.inf).all(dim=1).unfold(0, window, step).all(dim=1)
    weights = score.unfold(0, window, step).softmax(dim=2)  # [N, H, window]
    attended = (weights * value.unfold(0, window, step)).sum(dim=(1, 2))
    found = torch.where(unread, 0.0, attended)
    if (tokens - window) % step == 0:
        return found
    return torch.cat([found, _attended(score[-window:], value[-window:])[None]])


def _attended(score: Tensor, value: Tensor) -> Tensor:
    """The reading of a single window, from score and value [W, H]."""
    return torch.where((score == -torch.inf).all(), 0.0, (score.softmax(dim=0) * value).sum())


def prompt_reading(heads: ProbeHeads, part: PromptPart, memory: Tensor) -> Tensor:
    """[] float64: the reading of the probe that decides with ``heads``, for a prompt that ends in this pass.

    NaN, at which gates open, if a reading is missing, or if more than `max_unread_tokens` tokens were
    skipped: a guard that cannot read must not let the request pass.
    """
    readings = torch.zeros((), dtype=torch.float64, device=memory.device)
    blind = torch.zeros((), dtype=torch.bool, device=memory.device)
    for column, count in heads.summed:
        kept = memory[part.slots, column : column + 2 * count].double()
        score, value = kept[:, :count], kept[:, count:]
        ignored = (score == -torch.inf).all(dim=1)
        blind |= ignored.sum() > max_unread_tokens(len(part.slots))
        readings = readings + window_readings(score, value, heads.window)
    # A missing reading is NaN, and so is the largest then.
    return torch.where(blind, torch.nan, readings.max())


ANSWER_TOKENS_AT_ONCE = 256
"""Bounds the memory of a pass that recomputes a long answer."""


def answer_readings(heads: ProbeHeads, answer: AnswerTokens, memory: Tensor) -> Tensor:
    """[N] float64: at each generated token, the reading over the window that ends there; NaN as above."""
    assert heads.window is not None
    slots, present = answer.slots[:, -heads.window :], answer.present[:, -heads.window :]
    spans = [slice(i, i + ANSWER_TOKENS_AT_ONCE) for i in range(0, len(slots), ANSWER_TOKENS_AT_ONCE)]
    return torch.cat([_answer_readings(heads, slots[span], present[span], memory) for span in spans])


def _answer_readings(heads: ProbeHeads, slots: Tensor, present: Tensor, memory: Tensor) -> Tensor:
    tokens = present.sum(dim=1)
    reading = torch.zeros(len(slots), dtype=torch.float64, device=memory.device)
    for column, count in heads.summed:
        kept = memory[slots, column : column + 2 * count].double()  # [N, W, 2 H]
        score, value = kept[..., :count], kept[..., count:]
        skipped = (score == -torch.inf).all(dim=2) & present
        score = score.masked_fill(~present[..., None], -torch.inf)
        value = value.masked_fill(~present[..., None], 0.0)
        attended = (score.softmax(dim=1) * value).sum(dim=(1, 2))
        unread = skipped.sum(dim=1)
        reading = reading + torch.where(unread == tokens, 0.0, attended)
        reading = reading.masked_fill(unread > max_unread_tokens(tokens), torch.nan)
    return reading
