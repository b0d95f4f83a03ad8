"""What the gateway and the engine's plugin say to each other: headers, arguments and codes, declared once."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from interpretops.errors import EngineError
from interpretops.plan import ModelSpec
from interpretops.special_tokens import SpecialTokens

PREFIX: Final = "/interpretops/v1"
"""Where the plugin's own routes lie."""
HOLDER_HEADER: Final = "x-interpretops-holder"
"""Which gateway speaks: engines keep a plan as long as a gateway that lives holds it."""
NONCE_HEADER: Final = "x-interpretops-nonce"
"""Asks the engine to send the receipt of the request with its answer."""
RECEIPT_HEADER: Final = "x-interpretops-receipt"
"""The receipt of a whole answer."""
RECEIPT_COMMENT: Final = b": interpretops-receipt "
"""Begins the line of an event stream that holds the receipt: the last one before the end marker."""
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


class EngineMessage(BaseModel):
    """What the plugin answers. Fields that a newer plugin adds are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Rank(EngineMessage):
    """One worker of an engine, and the plans in its tables."""

    rank: int
    resident: dict[str, str] = {}
    """Revision to the digest of what the rank holds."""


class RankGroup(EngineMessage):
    """One engine core behind the API server."""

    ranks: list[Rank]


class SpecialTokenList(EngineMessage):
    """The tokenizer's special tokens, and whether they can be kept out of what callers write."""

    ids: dict[str, int]
    first: int | None = None
    fault: str | None = None


class Attestation(EngineMessage):
    """What the engine says it is."""

    plugin_version: str
    vllm_version: str
    boot_id: str
    model: dict[str, Any]
    engines: list[RankGroup]
    special_tokens: SpecialTokenList | None = None

    def special(self) -> SpecialTokens:
        """What no caller may write into a prompt. Raises `EngineError` where that cannot be kept."""
        if self.special_tokens is None:
            raise EngineError(
                f"engine's plugin {self.plugin_version} does not list the tokenizer's special tokens; "
                "install the gateway's version of interpretops beside the engine"
            )
        if self.special_tokens.fault is not None:
            raise EngineError(
                f"engine's special tokens cannot be kept out of prompts: {self.special_tokens.fault}"
            )
        return SpecialTokens(self.special_tokens.ids, self.special_tokens.first)

    def revisions(self) -> set[str]:
        """What any rank holds."""
        return {name for group in self.engines for rank in group.ranks for name in rank.resident}

    def spec(self) -> ModelSpec:
        """The model that plans must be compiled for."""
        try:
            return ModelSpec(**self.model)
        except TypeError as error:
            raise EngineError(f"engine attests an unknown model description: {error}") from None


class Receipt(EngineMessage):
    """What the engine did for one request of ours, which may be several of its own."""

    revision: str
    requests: int = Field(ge=0)
    """Engine requests: one for each choice of each prompt."""
    tokens_evaluated: int = Field(ge=0)
    edits_applied: int = Field(default=0, ge=0)
    gates_fired: int = Field(default=0, ge=0)
    cached_tokens: int = Field(default=0, ge=0)
    finished: bool
    """Whether every one of those has come to its end, so that no token of the answer is missing here."""

    @classmethod
    def read(cls, told: bytes) -> Receipt:
        """The receipt that came with an answer. Raises `EngineError`."""
        try:
            return cls.model_validate_json(told)
        except ValidationError as error:
            raise malformed(cls, error) from None

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer that went through the model or were found in its cache."""
        return self.tokens_evaluated + self.cached_tokens


class RankDigest(EngineMessage):
    """What one rank holds of a plan that was loaded."""

    rank: int
    digest: str
    shard: int = Field(default=0, ge=0)
    shards: int = Field(default=1, ge=1)


class LoadedPlan(EngineMessage):
    """The answer to a plan: every rank, and the digest of the numbers in its tables."""

    revision: str
    ranks: list[RankDigest]


def malformed(kind: type[EngineMessage], error: ValidationError) -> EngineError:
    """The error of an answer that does not have its declared form: names the field and what is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return EngineError(f"engine's {kind.__name__} is malformed: {where}: {first['msg']}")
