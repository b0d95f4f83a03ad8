"""A client's request, and every byte that it received for it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from simulation.engine import MODEL
from simulation.scenario import CHAT

_MARK = re.compile(rb"<g(\d+)>")
_ENDS = {
    "/v1/responses": b"event: response.completed\n",
    "/v1/messages": b"event: message_stop\n",
}


@dataclass(eq=False)
class Ask:
    """One request of a client."""

    number: int
    tenant: str
    key: str | None
    """The key itself."""
    route: str = CHAT
    model: str = MODEL
    choice: str | None = None
    by_alias: bool = False
    """Whether ``choice`` is appended to the model's name instead of sent as a header."""
    stream: bool = False
    prompts: int = 1
    choices: int = 1
    most: int = 8
    """Most tokens of each choice."""
    revoked_since: float | None = None
    """When its key was revoked, if that was before this request."""
    sent_at: float = 0.0
    whole_at: float | None = None
    """When its last byte was sent."""
    ended_at: float | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    """Whether the answer is complete."""
    cut: bool = False
    """Whether the connection ended first."""
    left: bool = False
    """Whether the client disconnected on its own."""

    @property
    def request_id(self) -> str:
        """Sent to the gateway, so that its audit log can be compared."""
        return f"ask{self.number}"

    @property
    def marks(self) -> set[int]:
        """Marks of the generations whose bytes are in the answer."""
        return {int(found) for found in _MARK.findall(self.body)}

    @property
    def ended_cleanly(self) -> bool:
        """Whether a client would take the stream for complete."""
        return _ENDS.get(self.route, b"data: [DONE]\n") in self.body

    @property
    def error(self) -> str | None:
        """The error code, if it was refused."""
        if self.status == 200 or not self.whole:
            return None
        try:
            return str(json.loads(self.body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return "unreadable"

    def bytes(self) -> tuple[bytes, bytes]:
        """Head and body as sent."""
        text = f"{self.request_id}. hello"
        body: dict[str, Any] = {
            "model": f"{self.model}+{self.choice}" if self.by_alias and self.choice else self.model,
            "stream": self.stream,
        }
        if self.route == "/v1/completions":
            body |= {"prompt": [text] * self.prompts if self.prompts > 1 else text, "max_tokens": self.most}
        elif self.route == "/v1/responses":
            body |= {"input": text, "max_output_tokens": self.most}
        else:
            body |= {"messages": [{"role": "user", "content": text}], "max_tokens": self.most}
        if self.choices > 1:
            body["n"] = self.choices
        data = json.dumps(body).encode()
        lines = [
            f"POST {self.route} HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            f"Content-Length: {len(data)}",
            f"X-Request-Id: {self.request_id}",
        ]
        if self.key is not None:
            lines.append(f"Authorization: Bearer {self.key}")
        if self.choice is not None and not self.by_alias:
            lines.append(f"X-Steering-Policy: {self.choice}")
        return "\r\n".join([*lines, "", ""]).encode(), data
