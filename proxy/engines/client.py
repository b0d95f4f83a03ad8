"""Client for one engine: vLLM's own routes and the plugin's, over a unix socket or TCP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Final, Self

import aiohttp
from pydantic import ValidationError

from interpretops.engine_api import (
    ATTEST_ROUTE,
    HOLDER_HEADER,
    SELF_TEST_ROUTE,
    Attestation,
    EngineCode,
    EngineRefusal,
    LoadedPlan,
    Receipt,
    SelfTest,
    plan_path,
    receipt_path,
)
from interpretops.errors import EngineError
from interpretops.plan import read_plan
from interpretops.plan.shard import Shard
from proxy.engines.http_connection import KEEPALIVE_S, Answer, EngineHttp

_MAX_BYTES: Final = 16 * 1024 * 1024
"""Longest response of the plugin's routes. Attestations of many ranks and revisions are far smaller."""
_HEALTH = aiohttp.ClientTimeout(total=5.0)


class EngineRefusedError(EngineError):
    """The plugin responded with one of its own errors."""

    def __init__(self, message: str, reason: EngineCode) -> None:
        super().__init__(message)
        self.reason = reason


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
        self._closed = False
        self._calls: set[asyncio.Timeout] = set()
        """Calls under way, which end when they are rescheduled."""
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
        self._closed = True
        self._http.close()
        # Of a closed session, who has the headers of an answer waits for its body until time is up.
        calls, self._calls = self._calls, set()
        for call in calls:
            call.reschedule(asyncio.get_running_loop().time())
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
        """Send a request. The caller must close the returned answer. Raises as `EngineHttp.post`."""
        return await self._http.post(
            route, body, headers or {}, total_timeout_s=total_timeout_s, idle_timeout_s=idle_timeout_s
        )

    async def healthy(self) -> bool:
        """Whether the engine's health route returns 200."""
        try:
            async with self._session.get(self._base + "/health", timeout=_HEALTH) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    async def check_health(self) -> None:
        """Raise `EngineError` unless the engine's health route returns 200."""
        if not await self.healthy():
            raise EngineError("its health check failed")

    async def models(self) -> list[dict[str, Any]]:
        """The engine's model list."""
        listed = (await self._call("GET", "/v1/models")).get("data")
        if not isinstance(listed, list) or not listed:
            raise EngineError("engine lists no models")
        return [item for item in listed if isinstance(item, dict) and isinstance(item.get("id"), str)]

    async def attest(self) -> Attestation:
        """The plugin's attestation: its identity and the plans it holds."""
        try:
            return Attestation.parse(await self._call("GET", ATTEST_ROUTE))
        except EngineRefusedError as error:
            raise EngineError(
                f"the engine does not attest the interpretops plugin ({error}); start it with "
                "VLLM_PLUGINS=interpretops and interpretops installed in its environment"
            ) from error

    async def selftest(self) -> None:
        """Run the engine's self-test: do edits change the running model? Raises `EngineError` if not."""
        answer = SelfTest.parse(await self._call("POST", SELF_TEST_ROUTE, accept=(200, 503)))
        if not answer.ok:
            raise EngineError(f"engine's self-test failed: {answer.reason or 'no reason given'}")

    async def load(self, revision: str, plan: bytes, digest: str) -> None:
        """Make a plan resident on every rank. Raises unless every rank attests the plan's digest."""
        loaded = LoadedPlan.parse(await self._call("PUT", plan_path(revision), data=plan))
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
                f"plan {revision[:12]}: ranks {wrong} of the engine attest another digest than the plan's"
                + (f", and no rank holds the shards {sorted(missing)}" if missing else "")
            )

    async def retire(self, revision: str) -> None:
        """Accept no more requests under a plan. The engine frees its rows after the last one ends."""
        await self._call("DELETE", plan_path(revision), accept=(200, 404))

    async def receipt(self, nonce: str) -> Receipt | None:
        """The receipt of the request that carried ``nonce``; None if the engine has none."""
        try:
            return Receipt.parse(await self._call("GET", receipt_path(nonce)))
        except EngineRefusedError as error:
            if error.reason is EngineCode.UNKNOWN_NONCE:
                return None
            raise

    async def _note_connection(self, *_trace: object) -> None:
        self._count_connection()

    def _count_connection(self) -> None:
        self.connections_made += 1

    async def _call(
        self, method: str, path: str, *, data: bytes | None = None, accept: tuple[int, ...] = (200,)
    ) -> Mapping[str, Any]:
        try:
            status, body = await self._exchange(method, path, data)
            answer = json.loads(body)
        except (aiohttp.ClientError, OSError, TimeoutError, RuntimeError) as error:
            why = "it was given up meanwhile" if self._closed else _why(error)
            raise EngineError(f"engine does not answer {method} {path}: {why}") from error
        except ValueError:
            raise EngineError(f"engine answers {method} {path} with a body that is not JSON") from None
        if not isinstance(answer, dict):
            raise EngineError(f"engine answers {method} {path} with a body that is not a JSON object")
        if status not in accept:
            raise _refused(f"engine refuses {method} {path.rsplit('/', 1)[0]}", status, answer)
        return answer

    async def _exchange(self, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
        """Status and body of an answer. Raises `TimeoutError` as soon as the client is closed."""
        async with asyncio.timeout(None) as ends:
            self._calls.add(ends)
            try:
                async with self._session.request(
                    *(method, self._base + path),
                    data=data,
                    headers=self._holder,
                    timeout=self._control,
                    allow_redirects=False,
                ) as response:
                    return response.status, await _read(response)
            finally:
                self._calls.discard(ends)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > _MAX_BYTES:
            response.close()
            raise EngineError(f"the engine's response exceeds {_MAX_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)


def _digests_of_shards(plan: bytes, shards: list[tuple[int, int]]) -> dict[tuple[int, int], str]:
    whole = read_plan(plan)
    return {(index, count): Shard(index, count).of_plan(whole).digest() for index, count in shards}


def _refused(what: str, status: int, answer: Mapping[str, Any]) -> EngineRefusedError:
    """The error of an answer with a status that is not success; the engine's own routes refuse otherwise."""
    try:
        refusal = EngineRefusal.model_validate(answer)
    except ValidationError:
        return EngineRefusedError(f"{what}: status {status}", EngineCode.FAILED)
    return EngineRefusedError(f"{what}: {refusal.message}", refusal.code)


def _why(error: BaseException) -> str:
    return str(error) or type(error).__name__
