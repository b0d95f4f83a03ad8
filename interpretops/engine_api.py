"""What the gateway and the engine's plugin say to each other: headers, arguments and codes, declared once."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Final

PREFIX: Final = "/interpretops/v1"
"""Where the plugin's own routes lie."""
HOLDER_HEADER: Final = "x-interpretops-holder"
"""Which gateway speaks: engines keep a plan as long as a gateway that lives holds it."""
NONCE_HEADER: Final = "x-interpretops-nonce"
"""Asks the engine to send the receipt of the request with its answer."""
RECEIPT_HEADER: Final = "x-interpretops-receipt"
"""The receipt of a whole answer; a stream ends with it, as a comment."""
REFUSAL_HEADER: Final = "x-interpretops-refusal"
"""The `EngineCode` of a request that the plugin refused, also in the body's `error.code`."""

REVISION_KEY: Final = "interpretops_revision"
"""In `vllm_xargs`: 64 hex, or `PASS_THROUGH`."""
NONCE_KEY: Final = "interpretops_nonce"
"""In `vllm_xargs`: names the receipt."""
PASS_THROUGH: Final = "none"  # noqa: S105 (no password)


class EngineCode(StrEnum):
    """Why the plugin refused: a stable word, on which the gateway acts. The text beside it is for people."""

    NOT_RESIDENT = "revision_not_resident"
    """The revision is not in the engine's tables, or is being taken out: load it, and ask again."""
    POLICY_DEMANDED = "policy_demanded"
    """This engine serves no request without a policy."""
    INVALID_SEAL = "invalid_seal"
    """The request does not say which revision it demands, or says it wrongly."""
    NOT_GENERATING = "not_generating"
    """Only requests that generate can be bound to a policy."""
    TABLE_FULL = "table_full"
    """No row is free for another plan."""
    INVALID_PLAN = "invalid_plan"
    """The plan is damaged, or not for this model."""
    PLAN_TOO_LARGE = "plan_too_large"
    DIGEST_MISMATCH = "digest_mismatch"
    """A rank holds other numbers than the plan."""
    UNKNOWN_NONCE = "unknown_nonce"
    """No receipt for this nonce."""
    FAILED = "engine_failed"
    """What nobody foresaw; the text says what."""

    @classmethod
    def of(cls, text: str) -> EngineCode:
        """The code that a text spells; `FAILED` for any other."""
        return cls(text) if text in set(cls) else cls.FAILED


STATUS: Final = MappingProxyType(
    {
        EngineCode.NOT_RESIDENT: 503,
        EngineCode.POLICY_DEMANDED: 503,
        EngineCode.INVALID_SEAL: 400,
        EngineCode.NOT_GENERATING: 400,
        EngineCode.TABLE_FULL: 507,
        EngineCode.INVALID_PLAN: 400,
        EngineCode.PLAN_TOO_LARGE: 413,
        EngineCode.DIGEST_MISMATCH: 500,
        EngineCode.UNKNOWN_NONCE: 404,
        EngineCode.FAILED: 500,
    }
)
"""Of every code the status of its answer."""
