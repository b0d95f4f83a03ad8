"""The edit op: gated low-rank edits of activations, per token, by the rows of the token's revision.

`naive` is the meaning; every other implementation is tested against it.

Shape letters: T tokens, D width, R rows (one per resident revision), U units of a table,
K units of one row, G gates, S requests in flight.
"""

from steering_kernels.ops.edit import apply_edits, apply_edits_captured
from steering_kernels.ops.gates import GateView, update_gates
from steering_kernels.ops.naive import (
    apply_edits_reference,
    attention_probe_reference,
    gate_open_reference,
)
from steering_kernels.ops.prompt_memory import (
    MEMORY_COLUMNS,
    ProbeHeads,
    PromptPart,
    empty_slots,
    may_ignore,
    new_memory,
)
from steering_kernels.ops.ranks import SumRanks
from steering_kernels.ops.step import NEVER, StepMap
from steering_kernels.ops.table import RowEdits, SiteTable, TableFullError

OP_VERSION = "3"
"""Changes whenever the op would give other numbers; part of the engine's compile-cache key."""

__all__ = [
    "MEMORY_COLUMNS",
    "NEVER",
    "OP_VERSION",
    "GateView",
    "ProbeHeads",
    "PromptPart",
    "RowEdits",
    "SiteTable",
    "StepMap",
    "SumRanks",
    "TableFullError",
    "apply_edits",
    "apply_edits_captured",
    "apply_edits_reference",
    "attention_probe_reference",
    "empty_slots",
    "gate_open_reference",
    "may_ignore",
    "new_memory",
    "update_gates",
]
