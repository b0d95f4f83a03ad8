"""Why the plugin refused: codes that the gateway acts on, and their HTTP statuses."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Final

from interpretops.errors import InterpretOpsError, NoRoomError, PlanError


class EngineCode(StrEnum):
    """Why the plugin refused. The gateway acts on this stable code; the message with it is for people."""

    NOT_RESIDENT = "revision_not_resident"
    """The revision is not in the engine's tables, or is being retired: load it and retry."""
    POLICY_DEMANDED = "policy_demanded"
    """This engine refuses requests without a policy."""
    INVALID_SEAL = "invalid_seal"
    """The request names no revision, or a malformed one."""
    NOT_GENERATING = "not_generating"
    """Only requests that generate can be bound to a policy."""
    TABLE_FULL = NoRoomError.code
    """The tables have no free row for another plan."""
    INVALID_PLAN = PlanError.code
    """The plan is damaged or was compiled for another model."""
    PLAN_TOO_LARGE = "plan_too_large"
    DIGEST_MISMATCH = "digest_mismatch"
    """A rank's numbers differ from the plan's."""
    UNKNOWN_NONCE = "unknown_nonce"
    """No receipt for this nonce."""
    FAILED = "plugin_failed"
    """Any other fault; the message says what. The gateway also reads unknown codes as this."""

    @classmethod
    def of(cls, text: str) -> EngineCode:
        """The code with this text; `FAILED` if there is none."""
        return cls(text) if text in set(cls) else cls.FAILED

    @classmethod
    def of_error(cls, error: InterpretOpsError) -> EngineCode:
        """The code for an error while loading a plan."""
        return cls.of(error.code)

    @property
    def status(self) -> int:
        """The HTTP status of a refusal with this code."""
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
"""The HTTP status of each code."""
