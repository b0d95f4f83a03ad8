"""Talks to one engine: vLLM's own routes and the plugin's, over a unix socket or TCP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote

import aiohttp
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from interpretops.engine_api import HOLDER_HEADER, PREFIX
from interpretops.errors import EngineError
from interpretops.plan import ModelSpec, read_plan
from interpretops.plan.shard import Shard
from interpretops.special_tokens import SpecialTokens
from proxy.engine_http import KEEPALIVE_S, Answer, EngineHttp

_MOST_BYTES: Final = 16 * 1024 * 1024
"""Longest answer of the plugin's routes; an attestation of many ranks and revisions is far below."""
_HEALTH = aiohttp.ClientTimeout(total=5.0)


class _Answer(BaseModel):
    """What the plugin answers; fields that a newer plugin adds are left aside."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Rank(_Answer):
    """One worker of an engine, and the plans in its tables."""

    rank: int
    resident: dict[str, str] = {}
    """Revision to the digest of what the rank holds."""


class RankGroup(_Answer):
    """One engine core behind the API server."""

    ranks: list[Rank]


class _Special(_Answer):
    """The tokenizer's special tokens, and whether they can be kept out of what callers write."""

    ids: dict[str, int]
    first: int | None = None
    fault: str | None = None


class Attestation(_Answer):
    """What the engine says it is."""

    plugin_version: str
    vllm_version: str
    boot_id: str
    model: dict[str, Any]
    engines: list[RankGroup]
    special_tokens: _Special | None = None

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


class Receipt(_Answer):
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
            raise _malformed(cls, error) from None

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer that went through the model or were found in its cache."""
        return self.tokens_evaluated + self.cached_tokens


class _RankDigest(_Answer):
    rank: int
    digest: str
    shard: int = Field(default=0, ge=0)
    shards: int = Field(default=1, ge=1)


class _Loaded(_Answer):
    revision: str
    ranks: list[_RankDigest]


T = TypeVar("T", bound=_Answer)


class EngineRefusedError(EngineError):
    """The plugin answered with an error of its own."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.reason = code


class EngineClient:
    """A connection pool to one engine. Closed by `close`; after that every call raises `EngineError`."""

    def __init__(
        self,
        address: str,
        *,
        connect_timeout_s: float,
        control_timeout_s: float = 60.0,
        holder: str | None = None,
    ) -> None:
        self.address = address
        self._holder = {} if holder is None else {HOLDER_HEADER: holder}
        connector: aiohttp.BaseConnector
        if address.startswith("unix://"):
            connector = aiohttp.UnixConnector(
                address.removeprefix("unix://"), limit=0, keepalive_timeout=KEEPALIVE_S
            )
            self._base = "http://engine"
        else:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S)
            self._base = address.rstrip("/")
        trace = aiohttp.TraceConfig()
        trace.on_connection_create_end.append(self._note_connection)
        self.connections_made = 0
        """Connections opened so far, by any call."""
        self._control = aiohttp.ClientTimeout(total=control_timeout_s, sock_connect=connect_timeout_s)
        self._http = EngineHttp(address, connect_timeout_s=connect_timeout_s, made=self._count_connection)
        self._session = aiohttp.ClientSession(
            connector=connector,
            trace_configs=[trace],
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections; requests in progress fail."""
        self._http.close()
        await self._session.close()

    async def generate(
        self,
        route: str,
        body: bytes,
        *,
        total_timeout_s: float,
        idle_timeout_s: float | None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Send a request; returns the open answer, which the caller closes. Raises as `EngineHttp.post`."""
        return await self._http.post(
            route, body, headers or {}, total_timeout_s=total_timeout_s, idle_timeout_s=idle_timeout_s
        )

    async def healthy(self) -> bool:
        """Whether the engine's own health route says so."""
        try:
            async with self._session.get(self._base + "/health", timeout=_HEALTH) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def check_health(self) -> None:
        """Raise `EngineError` unless the engine's own health route is content."""
        if not await self.healthy():
            raise EngineError("its health route does not say so")

    async def models(self) -> list[dict[str, Any]]:
        """The engine's own model list."""
        listed = (await self._call("GET", "/v1/models")).get("data")
        if not isinstance(listed, list) or not listed:
            raise EngineError("engine lists no models")
        return [item for item in listed if isinstance(item, dict) and isinstance(item.get("id"), str)]

    async def attest(self) -> Attestation:
        """Ask the plugin what it is and holds."""
        try:
            return _parse(Attestation, await self._call("GET", f"{PREFIX}/attest"))
        except EngineRefusedError as error:
            raise EngineError(
                f"the engine does not attest the interpretops plugin ({error}); start it with "
                "VLLM_PLUGINS=interpretops and interpretops installed beside it"
            ) from error

    async def selftest(self) -> None:
        """Let the engine prove through the running model that edits act; raises `EngineError` when not."""
        answer = await self._call("POST", f"{PREFIX}/selftest", accept=(200, 503))
        if answer.get("ok") is not True:
            raise EngineError(f"engine's self-test failed: {answer.get('reason', 'no reason given')}")

    async def load(self, revision: str, plan: bytes, digest: str) -> None:
        """Make a plan resident on every rank; raises unless every rank attests its very numbers."""
        loaded = _parse(_Loaded, await self._call("PUT", f"{PREFIX}/plans/{quote(revision)}", data=plan))
        shards = sorted({(rank.shard, rank.shards) for rank in loaded.ranks} - {(0, 1)})
        expected = {(0, 1): digest}
        if shards:
            expected |= await asyncio.to_thread(_digests_of_shards, plan, shards)
        wrong = [rank.rank for rank in loaded.ranks if rank.digest != expected[rank.shard, rank.shards]]
        held = {(rank.shard, rank.shards) for rank in loaded.ranks}
        missing = {(shard, count) for _, count in held for shard in range(count)} - held
        if loaded.revision != revision or not loaded.ranks or wrong or missing:
            await self.retire(revision)
            raise EngineError(
                f"plan {revision[:12]}: ranks {wrong} of the engine hold other numbers than the plan"
                + (f", and no rank has the parts {sorted(missing)}" if missing else "")
            )

    async def retire(self, revision: str) -> None:
        """Admit no more requests under a plan; the engine frees its rows after the last one."""
        await self._call("DELETE", f"{PREFIX}/plans/{quote(revision)}", accept=(200, 404))

    async def receipt(self, nonce: str) -> Receipt | None:
        """What was done for the request that carried ``nonce``; None when the engine knows of none."""
        answer = await self._call("GET", f"{PREFIX}/receipts/{quote(nonce)}", accept=(200, 404))
        return _parse(Receipt, answer) if "revision" in answer else None

    async def _note_connection(self, *_trace: object) -> None:
        self._count_connection()

    def _count_connection(self) -> None:
        self.connections_made += 1

    async def _call(
        self, method: str, path: str, *, data: bytes | None = None, accept: tuple[int, ...] = (200,)
    ) -> Mapping[str, Any]:
        try:
            async with self._session.request(
                *(method, self._base + path),
                data=data,
                headers=self._holder,
                timeout=self._control,
                allow_redirects=False,
            ) as response:
                status = response.status
                answer = json.loads(await _read(response))
        except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError) as error:
            raise EngineError(f"engine does not answer {method} {path}: {_why(error)}") from error
        except ValueError:
            raise EngineError(f"engine answers {method} {path} with something that is not JSON") from None
        if not isinstance(answer, dict):
            raise EngineError(f"engine answers {method} {path} with something that is no JSON object")
        if status not in accept:
            told = answer.get("error")
            detail = told if isinstance(told, dict) else {}
            message, code = detail.get("message", f"status {status}"), detail.get("code", status)
            raise EngineRefusedError(
                f"engine refuses {method} {path.rsplit('/', 1)[0]}: {message}", str(code)
            )
        return answer


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > _MOST_BYTES:
            response.close()
            raise EngineError(f"the engine answers with more than {_MOST_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _digests_of_shards(plan: bytes, shards: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
    whole = read_plan(plan)
    return {(index, count): Shard(index, count).of_plan(whole).digest() for index, count in shards}


def _parse(kind: type[T], answer: Mapping[str, Any]) -> T:
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        raise _malformed(kind, error) from None


def _malformed(kind: type[_Answer], error: ValidationError) -> EngineError:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return EngineError(f"engine's {kind.__name__.strip('_')} is malformed: {where}: {first['msg']}")


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
