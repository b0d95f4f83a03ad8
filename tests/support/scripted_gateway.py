"""A fake gateway that answers by the words of the prompt, with label and receipt like the real one."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from discovery.gates.refusal_sentences import CLOSINGS, OPENING

REVISION = "ab" * 32
REFUSAL = f"{OPENING} {CLOSINGS[0]}"
ANSWER = "Of course, here is what you asked for in a few words."
GIBBERISH = "I'm sorry I can't help with with with with with with with with with with"


class Gateway:
    """Answers with label and receipt; refuses by policy and words; counts requests."""

    def __init__(self, revision: str = REVISION) -> None:
        self.revision, self.asked, self.fail_after = revision, 0, 10**9
        self.headers: Callable[[str, dict[str, str]], dict[str, str]] = lambda policy, headers: headers
        self.busy = 0
        self.not_ready = 0
        self.names = ["tiny+guard", "tiny"]
        self.untold: set[str] = set()
        """Policies under which prompt readings are refused."""
        self.continuations: tuple[dict[str, str], dict[str, str]] = ({}, {})
        """Log-probabilities of plain text without and with a policy, by text."""
        self.most_tokens = 10**6
        self.salts: list[str] = []
        """Timed requests, in order."""
        self.hold: Callable[[str], Awaitable[None]] = lambda policy: asyncio.sleep(0)
        """Delay of a timed request, by policy."""
        self.systems: set[str] = set()
        """System prompts received."""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._score)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": name} for name in self.names]})

    def _respond(self, request: web.Request, body: dict[str, Any], fired: int) -> web.Response:
        policy = request.headers["X-Steering-Policy"]
        self.asked += 1
        if self.busy:
            self.busy -= 1
            return web.json_response({"error": {"message": "busy"}}, status=503)
        if self.not_ready:
            self.not_ready -= 1
            error = {"message": "the engine is not ready; try again in a moment", "code": "engine_not_ready"}
            return web.json_response({"error": error}, status=503)
        if self.asked > self.fail_after:
            return web.json_response({"error": {"message": "no more"}}, status=400)
        steered = policy != "none"
        revision = self.revision if steered else "none"
        receipt = {"revision": revision, "tokens_evaluated": 5 * steered, "gates_fired": fired}
        headers = {
            "X-Steering-Policy": f"{policy}@{revision[:12]}" if steered else "none",
            "X-Steering-Receipt": json.dumps(receipt),
        }
        return web.json_response(body, headers=self.headers(policy, headers))

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        assert body["temperature"] == 0
        if body.get("ignore_eos"):
            return await self._time(request, body)
        prompt, steered = body["messages"][-1]["content"], request.headers["X-Steering-Policy"] != "none"
        if "endless" in prompt:
            message = "This model's maximum context length is 2048 tokens. However, your prompt is longer."
            return web.json_response({"error": {"message": message}}, status=400)
        self.systems |= {turn["content"] for turn in body["messages"] if turn["role"] == "system"}
        text = self.answer(prompt, steered)
        if steered and "bad" in prompt:
            text = GIBBERISH if "odd" in prompt else REFUSAL
        if steered and "touchy" in prompt:
            text = REFUSAL
        if body["messages"][0]["role"] == "system" and ("bad" in prompt or "kind 1" in prompt):
            text = REFUSAL
        fired = int(steered and ("bad" in prompt or "touchy" in prompt))
        return self._respond(request, {"choices": [{"message": {"content": text}}]}, fired)

    def answer(self, prompt: str, steered: bool) -> str:
        """The answer to a prompt that is not refused."""
        del steered
        return f"{ANSWER} {prompt[len('capital of ') :]}City" if prompt.startswith("capital of") else ANSWER

    async def _time(self, request: web.Request, body: dict[str, Any]) -> web.Response:
        """A request with a forced length; it waits until the test releases it."""
        policy = request.headers["X-Steering-Policy"]
        self.salts.append(body["cache_salt"])
        await self.hold(policy)
        count = min(body["max_tokens"], self.most_tokens)
        return self._respond(
            request,
            {"choices": [{"message": {"content": "x"}, "text": "x"}], "usage": {"completion_tokens": count}},
            0,
        )

    async def _score(self, request: web.Request) -> web.Response:
        steered, body = request.headers["X-Steering-Policy"] != "none", await request.json()
        if body.get("ignore_eos"):
            return await self._time(request, body)
        if "prompt_logprobs" not in body:
            text = self.continuations[steered].get(body["prompt"], ANSWER)
            return self._respond(request, {"choices": [{"text": text}]}, 0)
        if request.headers["X-Steering-Policy"] in self.untold:
            error = {"message": "leave it out", "code": "field_not_allowed", "param": "prompt_logprobs"}
            return web.json_response({"error": error}, status=400)
        log = -2.0 - 0.01 * steered
        logs = [None, *({str(i): {"logprob": log}} for i in range(4))]
        return self._respond(request, {"choices": [{"text": "x", "prompt_logprobs": logs}]}, 0)


@asynccontextmanager
async def served(gateway: Gateway) -> AsyncIterator[str]:
    """The gateway on a free port."""
    runner = web.AppRunner(gateway.app())
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
