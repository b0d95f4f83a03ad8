"""The tokens of one forward pass: whose row edits each, its position, and which gates are open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steering_kernels.ops.prompt_memory import PromptPart

NEVER = torch.iinfo(torch.int64).max
"""Position at which a gate that has not fired would open."""


class StepMap:
    """Who is who in the batch of the current forward pass.

    ``fired_at [S, G]`` outlives the step: the first position at which a latched gate of a request fired.
    Because it is a position and not a flag, recomputing a request's tokens opens its gates at the same ones.

    A captured graph reads a pass of up to ``room`` tokens at addresses of its own; what lies there belongs to
    the pass, and is row 0 past its last token.
    """

    def __init__(self, *, requests: int, gates: int, device: torch.device, room: int = 0) -> None:
        self.device = device
        self.gates = gates
        self.room = room
        self.fired_at = torch.full((requests, gates), NEVER, dtype=torch.int64, device=device)
        self.edited = torch.zeros(requests, dtype=torch.int64, device=device)
        """[S] (token, site) pairs that were changed, per request."""
        self.opened = torch.zeros(requests, dtype=torch.int64, device=device)
        """[S] (token, gate) pairs at which a conditional gate was open, per request."""
        self._spill = self._fixed_spill = torch.empty(0, 0, device=device)
        self._fixed = torch.zeros(4, room, dtype=torch.int64, device=device)
        self._fixed_gates = _closed(room, gates, device)
        self._all_closed = self._fixed_gates.clone()
        self._fixed_in_use = False
        self.memory: Tensor | None = None
        """What gates that read whole prompts keep of their tokens (`prompt_memory`); outlives the step."""
        self.end()

    def end(self) -> None:
        """The pass is over; another must not run before it was laid out (`check_laid_out`)."""
        self._forget_pass()
        self._erase_fixed()
        self._laid_out = False

    def clear(self) -> None:
        """No token of the coming forward pass is edited (dummy and warm-up passes)."""
        self.end()
        self._laid_out = True

    def check_laid_out(self) -> None:
        """Raise RuntimeError where nobody said whose tokens the pass holds: it must not run unedited."""
        if not self._laid_out:
            raise RuntimeError(
                "a forward pass reached an edit site before its batch was laid out, so that nobody knows "
                "which policies its tokens need; is this a runner of vLLM that the plugin does not know?"
            )

    def _forget_pass(self) -> None:
        self.active = False
        self.num_tokens = 0
        self.ends_prompt = False
        """Whether the pass holds the last token of any prompt."""
        self.row_of_token, self.slot_of_token, self.position, self.prompt_length = self._fixed
        self.gate_open = self._fixed_gates
        self.rows: tuple[int, ...] = ()
        """The rows that act in this pass, 0 not among them."""
        self._row_of_token: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._tokens_of: dict[int, Tensor | None] = {}
        self.prompts: list[PromptPart] = []
        """Prompts in this pass whose revision has a gate that reads them whole."""

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
        """Lay out a batch, one entry per request in batch order.

        rows             row of the request's revision; 0 edits nothing
        slots            index of the request in ``fired_at``
        num_tokens       tokens of the request in this pass
        first_position   position of the first of them in the request
        prompt_length    prompt tokens of the request
        """
        self._forget_pass()
        self._laid_out = True
        if not any(rows):
            self._erase_fixed()
            return
        # Laid out in numpy: for the few tokens of a decode step its calls cost a fraction of torch's.
        counts = np.asarray(num_tokens, np.int64)
        total = int(counts.sum())
        request = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(total) - (counts.cumsum() - counts)[request]
        fixed = total <= self.room
        layout = np.zeros((4, self.room if fixed else total), np.int64)
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
        """[n] int64, the tokens of a row that acts in this pass; None where all are."""
        if row not in self._tokens_of:
            mine = np.flatnonzero(self._row_of_token == row)
            whole = len(mine) == self.num_tokens
            self._tokens_of[row] = (
                None if whole else _pinned(mine, self.device).to(self.device, non_blocking=True)
            )
        return self._tokens_of[row]

    def spill(self, units: int) -> Tensor:
        """[T, units] float32: where the fused kernel keeps what does not fit in its registers.

        At one address for all passes within ``room``, which must all ask for the same number of units.
        """
        if self.num_tokens <= self.room:
            if not self._fixed_spill.numel():
                self._fixed_spill = torch.empty(self.room, units, device=self.device)
            return self._fixed_spill
        if self._spill.shape[0] < self.num_tokens or self._spill.shape[1] < units:
            self._spill = torch.empty(self.num_tokens, units, device=self.device)
        return self._spill

    def forget_request(self, slot: int) -> None:
        """Make a slot ready for another request."""
        self.fired_at[slot] = NEVER
        self.edited[slot] = 0
        self.opened[slot] = 0


def _closed(tokens: int, gates: int, device: torch.device) -> Tensor:
    """[T, G] gates of which only the first, which always is, stands open."""
    found = torch.zeros(tokens, gates, dtype=torch.bool, device=device)
    found[:, 0] = True
    return found


def _pinned(values: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    """On the host, where a GPU can fetch it without anyone waiting for that."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor
