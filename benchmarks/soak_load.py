"""The soak's load: callers who check every answer against the requested policy, and an operator who
reloads."""

from __future__ import annotations

import json
import random
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from interpretops.files.atomic_file import write_atomically

SHIPPED = ("jailbreak", "toxicity")
TURNING = "turning"
"""The policy that keeps changing."""
CHOICES = (*SHIPPED, TURNING, TURNING, "none")
SUBJECTS = ("the sea", "a green mango", "old bridges", "the moon", "bread", "a lost key", "rain", "chess")


@dataclass
class Answer:
    """One request as seen by its caller. Times are monotonic."""

    began: float
    ended: float
    streamed: bool
    asked: str
    """Policy that must have been applied."""
    first_event: float | None = None
    left: bool = False
    """Whether the caller disconnected."""
    revision: str | None = None
    fault: str | None = None


@dataclass
class Turn:
    """One revision of the changing policy: it may serve from `begins` on, and new requests until `ends`."""

    revision: str
    begins: float
    ends: float = float("inf")


@dataclass
class Load:
    """Callers and an operator of one gateway, and what they observed."""

    url: str
    admin: str
    keys: dict[str, str]
    policies: Path
    answers: list[Answer] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    reload_s: list[float] = field(default_factory=list)

    @property
    def operator(self) -> dict[str, str]:
        """The operator's request options."""
        return {"Authorization": f"Bearer {self.keys['operator']}"}

    async def chat(self, session: aiohttp.ClientSession, rng: random.Random) -> None:
        """Send and judge one request, streamed or not."""
        tenant = rng.choice(("free", "free", "free", "bound"))
        asked = rng.choice(CHOICES) if tenant == "free" else "jailbreak"
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        if tenant == "free":
            headers["X-Steering-Policy"] = asked
        streamed, leaves = rng.random() < 0.5, rng.random() < 0.1
        text = f"Tell me something about {rng.choice(SUBJECTS)}, number {rng.randrange(10**6)}."
        body = {
            "model": "smollm2-135m-instruct",
            "messages": [{"role": "user", "content": text}],
            "max_tokens": rng.choice((8, 16, 32, 64)),
            "temperature": rng.choice((0.0, 0.8)),
            "stream": streamed,
        }
        answer = Answer(time.monotonic(), 0.0, streamed, asked)
        try:
            async with session.post(self.url + "/v1/chat/completions", json=body, headers=headers) as got:
                if got.status != 200:
                    answer.fault = f"status {got.status}: {(await got.text())[:300]}"
                elif leaves and streamed:
                    await got.content.readany()
                    got.close()
                    answer.left = True
                elif streamed:
                    first = await got.content.readany()
                    answer.first_event = time.monotonic()
                    self._judge_stream(answer, got, (first + await got.content.read()).decode())
                else:
                    await got.read()
                    receipt = json.loads(got.headers["X-Steering-Receipt"])
                    self._judge(answer, got.headers["X-Steering-Policy"], receipt)
        except (aiohttp.ClientError, OSError) as error:
            answer.fault = f"{type(error).__name__}: {error}"
        answer.ended = time.monotonic()
        self.answers.append(answer)

    def _judge_stream(self, answer: Answer, got: aiohttp.ClientResponse, text: str) -> None:
        receipts = re.findall(r"^: steering-receipt (\{.*\})$", text, re.MULTILINE)
        if len(receipts) != 1 or not text.endswith("data: [DONE]\n\n"):
            answer.fault = f"a stream with {len(receipts)} receipts that ends in {text[-100:]!r}"
            return
        self._judge(answer, got.headers["X-Steering-Policy"], json.loads(receipts[0]))

    def _judge(self, answer: Answer, label: str, receipt: dict[str, Any]) -> None:
        policy, _, short = label.partition("@")
        answer.revision = receipt["revision"]
        if policy != answer.asked:
            answer.fault = f"{answer.asked} was asked for, {label} was applied"
        elif receipt["policy"] != policy or not receipt["revision"].startswith(short):
            answer.fault = f"the answer names {label}, but its receipt is {receipt}"
        elif policy != "none" and receipt["tokens_evaluated"] < 1:
            answer.fault = f"no token was evaluated: {receipt}"

    async def turn(self, session: aiohttp.ClientSession, number: int) -> None:
        """Change the policy and reload; the new revision holds once the reload responds."""
        begins = time.monotonic()
        text = (
            f"meta: {{id: {TURNING}}}\ninterventions:\n  - {{type: head_scale, selector: "
            f"{{layer: 20, heads: [3]}}, scale: {0.5 + number % 400 / 1000}}}\n"
        )
        write_atomically(self.policies / f"{TURNING}.yaml", text.encode())
        async with session.post(self.admin + "/admin/reload", headers=self.operator) as answer:
            report = await answer.json()
        if not report.get("ok"):
            raise RuntimeError(f"a reload failed: {report}")
        ended = time.monotonic()
        self.reload_s.append(ended - begins)
        async with session.get(self.admin + "/admin/policies", headers=self.operator) as answer:
            listed = {entry["id"]: entry for entry in (await answer.json())["policies"]}
        if self.turns:
            self.turns[-1].ends = ended
        active = (each for each in listed[TURNING]["revisions"] if each["state"] == "active")
        self.turns.append(Turn(next(active)["revision"], begins))


def out_of_turn(turns: list[Turn], answer: Answer) -> str | None:
    """Why the answer's revision was not in force while it was generated; None if it was."""
    if answer.asked != TURNING or answer.revision is None:
        return None
    for turn in turns:
        # The same content may recur: any of its periods counts.
        if turn.revision == answer.revision and turn.begins <= answer.ended and answer.began <= turn.ends:
            return None
    return (
        f"{TURNING}@{answer.revision[:12]} answered a request that began after its successor was acknowledged"
    )
