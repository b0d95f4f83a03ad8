"""Why the plugin refused: the codes on which the gateway acts, and their statuses."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Final

from interpretops.errors import InterpretOpsError, NoRoomError, PlanError


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
    TABLE_FULL = NoRoomError.code
    """No row is free for another plan."""
    INVALID_PLAN = PlanError.code
    """The plan is damaged, or not for this model."""
    PLAN_TOO_LARGE = "plan_too_large"
    DIGEST_MISMATCH = "digest_mismatch"
    """A rank holds other numbers than the plan."""
    UNKNOWN_NONCE = "unknown_nonce"
    """No receipt for this nonce."""
    FAILED = "plugin_failed"
    """A fault that has no code of its own; the text says what. Also how the gateway reads an unknown code."""

    @classmethod
    def of(cls, text: str) -> EngineCode:
        """The code that a text spells; `FAILED` for any other."""
        return cls(text) if text in set(cls) else cls.FAILED

    @classmethod
    def of_error(cls, error: InterpretOpsError) -> EngineCode:
        """The code of what went wrong while a plan was loaded."""
        return cls.of(error.code)

    @property
    def status(self) -> int:
        """HTTP status of an answer with this code."""
        return STATUS[self]


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
