"""Gates that read a whole prompt: what they read at each token, kept where its keys and values are kept.

A prompt may reach the engine in several passes, and part of it may lie in the prefix cache and never be
computed again. What an attention probe needs of a token, a score and a value a head, is therefore written
into the slot of the token's keys and values: it is there exactly as long as they are, and belongs to the
revision whose salt they have. A slot that is given to another request is emptied first (`empty_slots`), and
answers are not left in the cache for such revisions (`interpretops.plan.reach`): nobody reads them as
they are written, so that a later turn could not know what they say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MEMORY_COLUMNS = 192
"""Numbers kept for a token: two for each head of a row's attention probes."""


@dataclass(frozen=True, eq=False)
class PromptPart:
    """The prompt tokens of one request in a pass."""

    row: int
    first: int
    """Place of the first in the pass."""
    slots: Tensor
    """[P] int64, slots of the prompt's tokens from position 0 to the last in this pass"""
    count: int
    """How many of them are in this pass: the last ones."""
    ends: bool
    """Whether the last of them ends the prompt."""


@dataclass(frozen=True, eq=False)
class ProbeHeads:
    """The heads of an attention probe at one site, and where it keeps what they read.

    Formula: `interpretops.plan.Gate`.
    """

    query: Tensor
    """[H, D] float64, like the two below"""
    read: Tensor
    bias: Tensor
    """[H]"""
    max_norm: float
    column: int
    """First of its 2 H columns in the memory."""
    summed: tuple[tuple[int, int], ...] = ()
    """Column and number of the heads, of this site and of those before, whose sum decides here; empty where
    nothing is decided."""


def may_ignore(tokens: int) -> int:
    """How many of a prompt's tokens a gate may leave unread because of their norm; past that it opens.

    A prompt begins with a sink, and a few more are ordinary (measured: docs/engine-integration.md).
    """
    return 4 + tokens // 16


def new_memory(slots: int, device: torch.device) -> Tensor:
    """[slots, MEMORY_COLUMNS] float32 that no probe has written: a reading over it is no number."""
    return torch.full((slots, MEMORY_COLUMNS), torch.nan, device=device)


def empty_slots(memory: Tensor, blocks: Tensor, block_size: int) -> None:
    """Make readings of earlier owners unreadable in blocks [B] int64 of so many slots each."""
    slots = (blocks[:, None] * block_size + torch.arange(block_size, device=blocks.device)).flatten()
    memory.index_fill_(0, slots, torch.nan)


def keep_readings(x: Tensor, heads: ProbeHeads, parts: list[PromptPart], memory: Tensor) -> None:
    """Keep what a probe reads at the prompt tokens of a pass.

    x       [T, D] the pass's activations at the heads' site
    parts   the prompts of the probe's row
    memory  changed at the slots of the tokens in the pass
    """
    columns = slice(heads.column, heads.column + 2 * len(heads.bias))
    for part in parts:
        wide = x[part.first : part.first + part.count].double()
        score = wide @ heads.query.t()
        value = torch.addmm(heads.bias, wide, heads.read.t())
        if heads.max_norm != float("inf"):
            score = score.masked_fill((wide.norm(dim=1) > heads.max_norm)[:, None], -torch.inf)
        memory[part.slots[-part.count :], columns] = torch.cat([score, value], dim=1).float()


def probe_fires(heads: ProbeHeads, cut: Tensor, part: PromptPart, memory: Tensor) -> Tensor:
    """Bool, whether the probe that decides with ``heads`` fires for a prompt that ends in this pass.

    Where anything that was to be kept is missing it fires, and where more tokens than `may_ignore` were not
    read: a guard that cannot read does not let through.
    """
    reading = torch.zeros((), dtype=torch.float64, device=memory.device)
    blind = torch.zeros((), dtype=torch.bool, device=memory.device)
    for column, count in heads.summed:
        kept = memory[part.slots, column : column + 2 * count].double()
        score, value = kept[:, :count], kept[:, count:]
        ignored = (score == -torch.inf).all(dim=1)
        blind |= ignored.sum() > may_ignore(len(part.slots))
        said = (score.softmax(dim=0) * value).sum()
        # Sinks alone: nothing was said at this site.
        reading = reading + torch.where(ignored.all(), 0.0, said)
    return ~(reading <= cut).all() | blind
