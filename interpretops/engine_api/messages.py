"""The messages of the plugin: attestation, loaded and retired plans, self-test, receipts and refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from interpretops.engine_api.codes import EngineCode
from interpretops.errors import EngineError
from interpretops.plan import ModelSpec
from interpretops.special_tokens import SpecialTokens

REFUSAL_TYPE: Final = "interpretops_refusal"
"""`error.type` of everything that the plugin refuses."""


class EngineMessage(BaseModel):
    """What the plugin answers. Fields that a newer plugin adds are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    @classmethod
    def read(cls, told: bytes | str) -> Self:
        """The message in a JSON text. Raises `EngineError`."""
        try:
            return cls.model_validate_json(told)
        except ValidationError as error:
            raise malformed(cls, error) from None

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Self:
        """The message in an object that was JSON. Raises `EngineError`."""
        try:
            return cls.model_validate(answer)
        except ValidationError as error:
            raise malformed(cls, error) from None

    def body(self) -> dict[str, Any]:
        """The object that goes over the wire."""
        return self.model_dump(mode="json")


class Refusal(EngineMessage):
    """The body of what the plugin refuses: an error in OpenAI's shape."""

    class Error(EngineMessage):
        """The error itself."""

        message: str
        type: str = REFUSAL_TYPE
        param: str | None = None
        code: str | int
        """An `EngineCode`, or that of a newer plugin; vLLM's own errors have a number."""

    error: Error

    @classmethod
    def of(cls, code: EngineCode, message: str) -> Refusal:
        """A refusal with one of the codes of the contract."""
        return cls(error=cls.Error(message=message, code=code.value))

    @property
    def code(self) -> EngineCode:
        """Why."""
        return EngineCode.of(str(self.error.code))

    @property
    def message(self) -> str:
        """Why, for people."""
        return self.error.message


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


class RetiredPlan(EngineMessage):
    """The answer when a plan is taken out."""

    revision: str
    in_flight: int = Field(ge=0)
    """Requests that still end under it."""


class SelfTest(EngineMessage):
    """Whether edits act through the running model, on every rank."""

    ok: bool
    reason: str = ""
    """Why not."""


class Rank(EngineMessage):
    """One worker of an engine, and the plans in its tables."""

    rank: int
    resident: dict[str, str] = {}
    """Revision to the digest of what the rank holds."""
    edits: dict[str, int] = {}
    """Revision to the (token, site) pairs that were edited under it so far; those with none are left out."""
    shard: int = Field(default=0, ge=0)
    shards: int = Field(default=1, ge=1)
    model: dict[str, Any] = {}
    points: list[str] = []
    """Points at which plans may act."""


class ResidentPlan(EngineMessage):
    """A plan as an engine core admits requests for it."""

    digest: str
    in_flight: int = Field(ge=0)
    retired: bool
    """Whether it takes no more requests."""


class RankGroup(EngineMessage):
    """One engine core behind the API server."""

    ranks: list[Rank]
    resident: dict[str, ResidentPlan] = {}
    """By revision."""
    pass_through: bool = True
    """Whether requests may name no policy."""


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
    points: list[str] = []
    special_tokens: SpecialTokenList | None = None
    passthrough: bool = True
    """Whether requests may name no policy."""

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

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer that went through the model or were found in its cache."""
        return self.tokens_evaluated + self.cached_tokens

    def line(self) -> str:
        """As it travels with an answer: compact JSON."""
        return self.model_dump_json()


_LOAD_ANSWER: Final[TypeAdapter[LoadedPlan | Refusal]] = TypeAdapter(LoadedPlan | Refusal)
_RANK_ANSWER: Final[TypeAdapter[RankDigest | Refusal]] = TypeAdapter(RankDigest | Refusal)


def read_loaded(answer: Mapping[str, Any]) -> LoadedPlan | Refusal:
    """What an engine core answers when it was given a plan."""
    return _LOAD_ANSWER.validate_python(answer)


def read_rank_loaded(answer: Mapping[str, Any]) -> RankDigest | Refusal:
    """What one rank answers when it was given a plan."""
    return _RANK_ANSWER.validate_python(answer)


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """A model as an attestation describes it; `Attestation.spec` reads it back."""
    return asdict(spec)


def malformed(kind: type[EngineMessage], error: ValidationError) -> EngineError:
    """The error of an answer that does not have its declared form: names the field and what is wrong."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return EngineError(f"engine's {kind.__name__} is malformed: {where}: {first['msg']}")
