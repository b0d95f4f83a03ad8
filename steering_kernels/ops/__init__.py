"""The edit op: gated low-rank edits of activations, applied per token by the row of the token's revision.

`naive` defines the op; every other implementation is tested against it.

Shape letters: T tokens, D width, R rows (one per resident revision), U units of a table,
K units of one row, G gates, S requests in progress.
"""

from steering_kernels.ops.edit import apply_edits, apply_edits_captured
from steering_kernels.ops.gates import GateView, update_gates
from steering_kernels.ops.naive import (
    apply_edits_reference,
    attention_probe_reference,
    gate_open_reference,
    windows_reference,
)
from steering_kernels.ops.prompt_memory import (
    MEMORY_COLUMNS,
    AnswerTokens,
    ProbeHeads,
    PromptPart,
    empty_slots,
    max_unread_tokens,
    new_memory,
    window_readings,
)
from steering_kernels.ops.ranks import SumRanks
from steering_kernels.ops.step import NEVER, StepMap
from steering_kernels.ops.table import RowEdits, SiteTable, TableFullError

OP_VERSION = "3"
"""Changes whenever the op's results change. Part of the engine's compile-cache key."""

__all__ = [
    "MEMORY_COLUMNS",
    "NEVER",
    "OP_VERSION",
    "AnswerTokens",
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
    "max_unread_tokens",
    "new_memory",
    "update_gates",
    "window_readings",
    "windows_reference",
]
