"""Load on your own gateway: chats, streamed or not, policies by header, and callers who disconnect.

    locust -f benchmarks/locustfile.py --host http://127.0.0.1:8000 --headless -u 16 -r 4 -t 2m

`--api-key` is needed if the gateway requires keys; `--policies` are chosen at random and may include `none`.
An answer counts as failed if it names another policy or has no receipt. `first event` in the statistics is
the time to a stream's first event.
"""

from __future__ import annotations

import json
import random
import time
from typing import Any

from locust import HttpUser, between, events, task


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Extra flags for locust; each can also be set by an environment variable."""
    parser.add_argument(
        "--api-key", env_var="LOCUST_API_KEY", is_secret=True, default="", help="a tenant's key"
    )
    parser.add_argument("--model", env_var="LOCUST_MODEL", default="", help="default: the first one served")
    parser.add_argument(
        "--policies",
        env_var="LOCUST_POLICIES",
        default="jailbreak,toxicity,none",
        help="comma-separated ids",
    )
    parser.add_argument("--max-tokens", env_var="LOCUST_MAX_TOKENS", type=int, default=48)


class Caller(HttpUser):
    """Sends requests one after another with short pauses."""

    wait_time = between(0.2, 2)

    def on_start(self) -> None:
        """Look up the model's name."""
        options = self.environment.parsed_options
        if options.api_key:
            self.client.headers["Authorization"] = f"Bearer {options.api_key}"
        self.policies = options.policies.split(",")
        self.model = options.model or self.client.get("/v1/models").json()["data"][0]["id"]

    @task(4)
    def whole(self) -> None:
        """A chat without streaming."""
        policy, request = self._request(stream=False)
        with self.client.post(name="chat, whole", catch_response=True, **request) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}: {answer.text[:200]}")
            elif json.loads(answer.headers.get("X-Steering-Receipt", "{}")).get("policy") != policy:
                answer.failure(f"{policy} was asked for, and no receipt proves it")

    @task(4)
    def streamed(self) -> None:
        """A chat streamed to its end."""
        self._stream(leave_after=None)

    @task(1)
    def hung_up(self) -> None:
        """A chat whose caller disconnects after some events."""
        self._stream(leave_after=random.randint(1, 8))

    def _stream(self, leave_after: int | None) -> None:
        policy, request = self._request(stream=True)
        name = "chat, streamed" if leave_after is None else "chat, hung up"
        began, count, receipt = time.perf_counter(), 0, {}
        with self.client.post(name=name, stream=True, catch_response=True, **request) as answer:
            if answer.status_code != 200:
                answer.failure(f"status {answer.status_code}: {answer.text[:200]}")
                return
            line = b""
            for line in filter(None, answer.iter_lines()):
                if line.startswith(b"data:"):
                    count += 1
                    if count == 1:
                        self._tell_first_event(time.perf_counter() - began)
                    if count == leave_after:
                        break
                elif line.startswith(b": steering-receipt "):
                    receipt = json.loads(line.removeprefix(b": steering-receipt "))
            if leave_after is None or count < leave_after:
                if line != b"data: [DONE]" or receipt.get("policy") != policy:
                    answer.failure(f"{policy} was asked for, and the stream's end does not prove it")
            elif not answer.headers.get("X-Steering-Policy", "").startswith(policy):
                answer.failure(
                    f"{policy} was asked for, but {answer.headers.get('X-Steering-Policy')} answers"
                )

    def _request(self, *, stream: bool) -> tuple[str, dict[str, Any]]:
        policy = random.choice(self.policies)
        subject = random.choice(("the sea", "green mangos", "old bridges", "bread", "chess", "the moon"))
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": f"Tell me something about {subject}."}],
            "max_tokens": self.environment.parsed_options.max_tokens,
            "stream": stream,
        }
        return policy, {
            "url": "/v1/chat/completions",
            "json": body,
            "headers": {"X-Steering-Policy": policy},
        }

    def _tell_first_event(self, seconds: float) -> None:
        events.request.fire(
            request_type="SSE",
            name="first event",
            response_time=1e3 * seconds,
            response_length=0,
            exception=None,
            context={},
        )
