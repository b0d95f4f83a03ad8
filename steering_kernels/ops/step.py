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
    """

    def __init__(self, *, requests: int, gates: int, device: torch.device) -> None:
        self.device = device
        self.gates = gates
        self.fired_at = torch.full((requests, gates), NEVER, dtype=torch.int64, device=device)
        self.edited = torch.zeros(requests, dtype=torch.int64, device=device)
        """[S] (token, site) pairs that were changed, per request."""
        self.opened = torch.zeros(requests, dtype=torch.int64, device=device)
        """[S] (token, gate) pairs at which a conditional gate was open, per request."""
        self._spill = torch.empty(0, 0, device=device)
        self.memory: Tensor | None = None
        """What gates that read whole prompts keep of their tokens (`prompt_memory`); outlives the step."""
        self.clear()

    def clear(self) -> None:
        """No token of the coming forward pass is edited (dummy and warm-up passes)."""
        empty = torch.zeros(0, dtype=torch.int64, device=self.device)
        self.active = False
        self.num_tokens = 0
        self.ends_prompt = False
        """Whether the pass holds the last token of any prompt."""
        self.row_of_token = self.slot_of_token = self.position = self.prompt_length = empty
        self.gate_open = torch.zeros(0, self.gates, dtype=torch.bool, device=self.device)
        self.groups: list[tuple[int, Tensor | None]] = []
        self.prompts: list[PromptPart] = []
        """Prompts in this pass whose revision has a gate that reads them whole."""

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
        self.clear()
        if not any(rows):
            return
        # Laid out in numpy: for the few tokens of a decode step its calls cost a fraction of torch's.
        counts = np.asarray(num_tokens, np.int64)
        total = int(counts.sum())
        request = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(total) - (counts.cumsum() - counts)[request]
        row = np.asarray(rows, np.int64)[request]
        position = np.asarray(first_position, np.int64)[request] + within
        prompt = np.asarray(prompt_length, np.int64)[request]

        def place(values: npt.NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(values).to(self.device)

        self.active = True
        self.num_tokens = total
        self.ends_prompt = bool((position == prompt - 1).any())
        self.row_of_token = place(row)
        self.slot_of_token = place(np.asarray(slots, np.int64)[request])
        self.position = place(position)
        self.prompt_length = place(prompt)
        self.gate_open = torch.zeros(total, self.gates, dtype=torch.bool, device=self.device)
        self.gate_open[:, 0] = True
        distinct = sorted(set(rows) - {0})
        if len(distinct) == 1 and all(rows):
            self.groups = [(distinct[0], None)]
        else:
            self.groups = [(index, place(np.flatnonzero(row == index))) for index in distinct]

    def spill(self, units: int) -> Tensor:
        """[T, units] float32: where the fused kernel keeps what does not fit in its registers."""
        if self._spill.shape[0] < self.num_tokens or self._spill.shape[1] < units:
            self._spill = torch.empty(self.num_tokens, units, device=self.device)
        return self._spill

    def forget_request(self, slot: int) -> None:
        """Make a slot ready for another request."""
        self.fired_at[slot] = NEVER
        self.edited[slot] = 0
        self.opened[slot] = 0
