"""The layout of one forward pass: each token's row, request slot and position, and the open gates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steering_kernels.ops.prompt_memory import AnswerTokens, PromptPart

NEVER = torch.iinfo(torch.int64).max
"""Value of ``fired_at`` for a gate that has not fired."""


class StepMap:
    """Maps the tokens of the current forward pass to rows, requests and positions.

    ``fired_at [S, G]`` persists across steps: the first position at which a request's latched gate fired.
    Because it is a position and not a flag, recomputed tokens see their gates open at the same positions.

    A captured graph reads passes of up to ``graph_tokens`` tokens from fixed buffers. These hold the current
    pass, and row 0 past its last token.
    """

    def __init__(self, *, requests: int, gates: int, device: torch.device, graph_tokens: int = 0) -> None:
        self.device = device
        self.gates = gates
        self.graph_tokens = graph_tokens
        self.fired_at = torch.full((requests, gates), NEVER, dtype=torch.int64, device=device)
        self.prompt_reading = torch.full((requests, gates), torch.nan, dtype=torch.float64, device=device)
        """What a gate of scope `prompt` read of a request's prompt. NaN before; persists across steps."""
        self.edited = torch.zeros(requests, dtype=torch.int64, device=device)
        """[S] (token, site) pairs edited, per request."""
        self.opened = torch.zeros(requests, dtype=torch.int64, device=device)
        """[S] (token, gate) pairs at which a conditional gate was open, per request."""
        self.refused = torch.zeros(requests, dtype=torch.int64, device=device)
        """[S] the last refusal gate that was open where a request's answer is generated; 0 if none was."""
        self._spill = self._fixed_spill = torch.empty(0, 0, device=device)
        self._fixed = torch.zeros(4, graph_tokens, dtype=torch.int64, device=device)
        self._fixed_gates = _closed(graph_tokens, gates, device)
        self._all_closed = self._fixed_gates.clone()
        self._fixed_in_use = False
        self.memory: Tensor | None = None
        """Readings of gates over whole prompts (`prompt_memory`); persists across steps."""
        self.end()

    def end(self) -> None:
        """End the pass. The next one must be laid out before it runs (`check_laid_out`)."""
        self._forget_pass()
        self._erase_fixed()
        self._laid_out = False

    def clear(self) -> None:
        """Lay out a pass in which no token is edited (dummy and warm-up passes)."""
        self.end()
        self._laid_out = True

    def check_laid_out(self) -> None:
        """Raise RuntimeError if the pass was not laid out: it must not run unedited."""
        if not self._laid_out:
            raise RuntimeError(
                "a forward pass reached an edit site before its batch was laid out, so the policies of its "
                "tokens are unknown; does this vLLM use a model runner that the plugin does not support?"
            )

    def _forget_pass(self) -> None:
        self.active = False
        self.num_tokens = 0
        self.ends_prompt = False
        """Whether the pass holds the last token of any prompt."""
        self.row_of_token, self.slot_of_token, self.position, self.prompt_length = self._fixed
        self.gate_open = self._fixed_gates
        self.rows: tuple[int, ...] = ()
        """The rows that act in this pass, without row 0."""
        self._row_of_token: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._tokens_of: dict[int, Tensor | None] = {}
        self.prompts: list[PromptPart] = []
        """Prompts in this pass whose revision has a gate over whole prompts."""
        self.answers: dict[int, AnswerTokens] = {}
        """By row: generated tokens in this pass whose revision has a gate over answers."""

    def _erase_fixed(self) -> None:
        if self._fixed_in_use:
            self._fixed.zero_()
            self._fixed_in_use = False

    def begin(
        self,
        *,
        rows: Sequence[int],
        slots: Sequence[int],
        num_tokens: Sequence[int],
        first_position: Sequence[int],
        prompt_length: Sequence[int],
    ) -> None:
        """Lay out a batch: one entry per request, in batch order.

        rows             row of the request's revision; 0 edits nothing
        slots            index of the request in ``fired_at``
        num_tokens       tokens of the request in this pass
        first_position   position of the first of these tokens in the request
        prompt_length    prompt tokens of the request
        """
        self._forget_pass()
        self._laid_out = True
        if not any(rows):
            self._erase_fixed()
            return
        # numpy, because for the few tokens of a decode step its calls cost a fraction of torch's.
        counts = np.asarray(num_tokens, np.int64)
        total = int(counts.sum())
        request = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(total) - (counts.cumsum() - counts)[request]
        fixed = total <= self.graph_tokens
        layout = np.zeros((4, self.graph_tokens if fixed else total), np.int64)
        row, slot, position, prompt = layout[:, :total]
        row[:] = np.asarray(rows, np.int64)[request]
        slot[:] = np.asarray(slots, np.int64)[request]
        position[:] = np.asarray(first_position, np.int64)[request] + within
        prompt[:] = np.asarray(prompt_length, np.int64)[request]

        self.active = True
        self.num_tokens = total
        self.ends_prompt = bool((position == prompt - 1).any())
        self.rows = tuple(sorted(set(rows) - {0}))
        self._row_of_token = row
        if fixed:
            self._fixed.copy_(_pinned(layout, self.device), non_blocking=True)
            self._fixed_gates.copy_(self._all_closed)
            self._fixed_in_use = True
            placed, self.gate_open = self._fixed[:, :total], self._fixed_gates[:total]
        else:
            self._erase_fixed()
            placed = _pinned(layout, self.device).to(self.device, non_blocking=True)
            self.gate_open = _closed(total, self.gates, self.device)
        self.row_of_token, self.slot_of_token, self.position, self.prompt_length = placed

    def tokens_of(self, row: int) -> Tensor | None:
        """[n] int64, indices of the tokens of an acting row; None if all tokens are of it."""
        if row not in self._tokens_of:
            mine = np.flatnonzero(self._row_of_token == row)
            whole = len(mine) == self.num_tokens
            self._tokens_of[row] = (
                None if whole else _pinned(mine, self.device).to(self.device, non_blocking=True)
            )
        return self._tokens_of[row]

    def spill(self, units: int) -> Tensor:
        """[T, units] float32: buffer of the fused kernel for values that do not fit in registers.

        Passes within ``graph_tokens`` share one address and must all ask for the same number of units.
        """
        if self.num_tokens <= self.graph_tokens:
            if not self._fixed_spill.numel():
                self._fixed_spill = torch.empty(self.graph_tokens, units, device=self.device)
            return self._fixed_spill
        if self._spill.shape[0] < self.num_tokens or self._spill.shape[1] < units:
            self._spill = torch.empty(self.num_tokens, units, device=self.device)
        return self._spill

    def forget_request(self, slot: int) -> None:
        """Reset a slot for another request."""
        self.fired_at[slot] = NEVER
        self.prompt_reading[slot] = torch.nan
        self.edited[slot] = 0
        self.opened[slot] = 0
        self.refused[slot] = 0


def _closed(tokens: int, gates: int, device: torch.device) -> Tensor:
    """[T, G] bool: all gates closed except gate 0, which is always open."""
    found = torch.zeros(tokens, gates, dtype=torch.bool, device=device)
    found[:, 0] = True
    return found


def _pinned(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """A host tensor; pinned for GPUs, so that it can be copied asynchronously."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor
