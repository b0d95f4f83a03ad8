"""A steady stream of mixed requests under the mandatory policy, each answer judged."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from faults.answers import Judgement, judge
from faults.marker import POLICY
from faults.stand import Stand
from interpretops.engine_api import PASS_THROUGH, REVISION_KEY

CLIENTS = 4
CONTENT: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
    "/v1/completions": {"prompt": "The sky is"},
    "/v1/responses": {"input": "What is the capital of France?"},
    "/v1/messages": {"messages": [{"role": "user", "content": "What is the capital of France?"}]},
}
_LENGTH = {"/v1/responses": "max_output_tokens"}
WAYS: list[dict[str, Any]] = [
    *({} for _ in range(6)),
    {"headers": {"X-Steering-Policy": POLICY}},
    {"headers": {"X-Steering-Policy": "none"}},
    {"alias": "+none"},
    {"fields": {"vllm_xargs": {REVISION_KEY: PASS_THROUGH}}},
]
"""The policy that a client names: mostly none, sometimes one it may not use."""


def make_body(route: str, model: str, *, stream: bool, tokens: int) -> dict[str, Any]:
    """A valid request."""
    return {"model": model, "stream": stream, _LENGTH.get(route, "max_tokens"): tokens, **CONTENT[route]}


class Traffic:
    """Sends requests, counts results, and records wrong ones."""

    def __init__(self, stand: Stand, seed: int = 0) -> None:
        self._stand = stand
        self._random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        """Every answer that was neither steered nor refused, and why it is wrong."""
        self.failures: Counter[str] = Counter()
        """Requests during which the engine failed, and the caller's error."""
        self.steered_ids: set[str] = set()
        """The `X-Request-Id` of each steered answer; the audit log must contain them all."""

    def count(self, judged: Judgement, where: str, way: str = "", request_id: str | None = None) -> None:
        """Record an answer by kind of request and named policy."""
        self.counts[judged.kind] += 1
        if judged.why:
            self.faults.append(f"{judged.kind} on {where} {way}: {judged.why}")
        if judged.reported:
            self.failures[f"{where}: {judged.reported}"] += 1
        if judged.kind == "steered" and request_id:
            self.steered_ids.add(request_id)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Traffic until the block ends; waits for the last requests."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as clients:
            for _ in range(CLIENTS):
                clients.create_task(self._ask_on(stop))
            try:
                yield
            finally:
                stop.set()

    async def steered_again(self, timeout_s: float = 120) -> None:
        """Wait until every client has had at least one new answer."""
        wanted = self.counts["steered"] + CLIENTS + 1

        async def enough() -> bool:
            return self.counts["steered"] >= wanted

        await self._stand.until(enough, "answers again", timeout_s)

    async def refused_for(self, code: str, timeout_s: float = 60) -> None:
        """Wait until a request is refused with a code."""
        wanted = self.counts[code] + 1

        async def enough() -> bool:
            return self.counts[code] >= wanted

        await self._stand.until(enough, f"a refusal for {code}", timeout_s)

    async def _ask_on(self, stop: asyncio.Event) -> None:
        for turn in itertools.count():
            if stop.is_set():
                return
            await self._ask(turn)

    async def _ask(self, turn: int) -> None:
        pick = self._random
        route, stream, way = pick.choice(list(CONTENT)), pick.random() < 0.5, pick.choice(WAYS)
        model = self._stand.model + way.get("alias", "")
        body = {
            **make_body(route, model, stream=stream, tokens=pick.choice((1, 8, 24))),
            **way.get("fields", {}),
        }
        where, said = f"{route} stream={stream}", str(way or "")
        request = self._stand.session.post(self._stand.url + route, json=body, headers=way.get("headers"))
        try:
            async with request as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            self.count(Judgement("misshapen", f"no answer: {type(error).__name__}"), where, said)
            return
        judged = judge(answer.status, answer.headers, text)
        self.count(judged, where, said, answer.headers.get("X-Request-Id"))
        if judged.kind == "refused":
            code = (await answer.json())["error"]["code"]
            self.counts[code] += 1
            # After a temporary refusal wait a little, as clients do.
            await asyncio.sleep(0.1 if answer.status >= 500 else 0)
