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
"""`error.type` of every refusal by the plugin."""


class EngineMessage(BaseModel):
    """A response of the plugin. Fields that a newer plugin adds are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    @classmethod
    def read(cls, told: bytes | str) -> Self:
        """Parse a message from JSON text. Raises `EngineError`."""
        try:
            return cls.model_validate_json(told)
        except ValidationError as error:
            raise malformed(cls, error) from None

    @classmethod
    def parse(cls, answer: Mapping[str, Any]) -> Self:
        """Parse a message from a decoded JSON object. Raises `EngineError`."""
        try:
            return cls.model_validate(answer)
        except ValidationError as error:
            raise malformed(cls, error) from None

    def body(self) -> dict[str, Any]:
        """The JSON object to send."""
        return self.model_dump(mode="json")


class EngineRefusal(EngineMessage):
    """The body of the engine's refusal: an error in OpenAI's format."""

    class Error(EngineMessage):
        """The error itself."""

        message: str
        type: str = REFUSAL_TYPE
        param: str | None = None
        code: str | int
        """An `EngineCode`, or a newer plugin's code; vLLM's own errors have a number."""

    error: Error

    @classmethod
    def of(cls, code: EngineCode, message: str) -> EngineRefusal:
        """A refusal with this code."""
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
    """The digest of a loaded plan on one rank."""

    rank: int
    digest: str
    shard: int = Field(default=0, ge=0)
    shards: int = Field(default=1, ge=1)


class LoadedPlan(EngineMessage):
    """The response to loading a plan: every rank, and the digest of the numbers in its tables."""

    revision: str
    ranks: list[RankDigest]


class RetiredPlan(EngineMessage):
    """The response to retiring a plan."""

    revision: str
    in_flight: int = Field(ge=0)
    """Requests that are still running under it."""


class SelfTest(EngineMessage):
    """Whether edits act through the running model, on every rank."""

    ok: bool
    reason: str = ""
    """Why not."""


class Rank(EngineMessage):
    """One worker of an engine, and the plans in its tables."""

    rank: int
    resident: dict[str, str] = {}
    """Revision to the digest of the rank's tables for it."""
    edits: dict[str, int] = {}
    """Revision to the (token, site) pairs edited under it so far; revisions with none are omitted."""
    shard: int = Field(default=0, ge=0)
    shards: int = Field(default=1, ge=1)
    model: dict[str, Any] = {}
    points: list[str] = []
    """Points at which plans may act."""


class ResidentPlan(EngineMessage):
    """A plan in the tables of an engine core."""

    digest: str
    in_flight: int = Field(ge=0)
    retired: bool
    """Whether it is being retired and takes no new requests."""


class RankGroup(EngineMessage):
    """The ranks of one engine core behind the API server."""

    ranks: list[Rank]
    resident: dict[str, ResidentPlan] = {}
    """By revision."""
    pass_through: bool = True
    """Whether requests may name no policy."""


class SpecialTokenList(EngineMessage):
    """The tokenizer's special tokens, and whether they can be kept out of client text."""

    ids: dict[str, int]
    first: int | None = None
    fault: str | None = None


class Attestation(EngineMessage):
    """The engine's attestation: its model, versions, ranks and plans."""

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
        """Tokens that clients may not put into prompts. Raises `EngineError` if they cannot be kept out."""
        if self.special_tokens is None:
            raise EngineError(
                f"engine's plugin {self.plugin_version} does not list the tokenizer's special tokens; "
                "install the gateway's version of interpretops with the engine"
            )
        if self.special_tokens.fault is not None:
            raise EngineError(
                f"engine's special tokens cannot be kept out of prompts: {self.special_tokens.fault}"
            )
        return SpecialTokens(self.special_tokens.ids, self.special_tokens.first)

    def revisions(self) -> set[str]:
        """Revisions on any rank."""
        return {name for group in self.engines for rank in group.ranks for name in rank.resident}

    def spec(self) -> ModelSpec:
        """The model that plans must be compiled for."""
        try:
            return ModelSpec(**self.model)
        except TypeError as error:
            raise EngineError(f"engine attests an unknown model description: {error}") from None


class Receipt(EngineMessage):
    """What the engine did for one gateway request, which may be several engine requests."""

    revision: str
    requests: int = Field(ge=0)
    """Engine requests: one per choice per prompt."""
    tokens_evaluated: int = Field(ge=0)
    edits_applied: int = Field(default=0, ge=0)
    gates_fired: int = Field(default=0, ge=0)
    cached_tokens: int = Field(default=0, ge=0)
    refusals: int = Field(default=0, ge=0)
    """Engine requests in which a refusal gate was open where the answer is generated."""
    finished: bool
    """Whether all of them have finished, so that the receipt covers every token of the answer."""

    @property
    def tokens(self) -> int:
        """Prompt and answer tokens that the model processed or that were in its cache."""
        return self.tokens_evaluated + self.cached_tokens

    def line(self) -> str:
        """The receipt as sent with an answer: compact JSON."""
        return self.model_dump_json()


_LOAD_ANSWER: Final[TypeAdapter[LoadedPlan | EngineRefusal]] = TypeAdapter(LoadedPlan | EngineRefusal)
_RANK_ANSWER: Final[TypeAdapter[RankDigest | EngineRefusal]] = TypeAdapter(RankDigest | EngineRefusal)


def read_loaded(answer: Mapping[str, Any]) -> LoadedPlan | EngineRefusal:
    """Read an engine core's response to loading a plan."""
    return _LOAD_ANSWER.validate_python(answer)


def read_rank_loaded(answer: Mapping[str, Any]) -> RankDigest | EngineRefusal:
    """Read one rank's response to loading a plan."""
    return _RANK_ANSWER.validate_python(answer)


def describe_model(spec: ModelSpec) -> dict[str, Any]:
    """The description of a model in an attestation; `Attestation.spec` reads it back."""
    return asdict(spec)


def malformed(kind: type[EngineMessage], error: ValidationError) -> EngineError:
    """The error for a response that breaks the protocol: names the field and the fault."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return EngineError(f"engine's {kind.__name__} is malformed: {where}: {first['msg']}")
