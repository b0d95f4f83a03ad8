"""What a client asked, and every byte that it got for it."""

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
    """One request of a client's."""

    number: int
    tenant: str
    key: str | None
    """The key itself."""
    route: str = CHAT
    model: str = MODEL
    choice: str | None = None
    by_alias: bool = False
    """Whether ``choice`` stands behind the model's name instead of in the header."""
    stream: bool = False
    prompts: int = 1
    choices: int = 1
    most: int = 8
    """Tokens that each choice may have."""
    revoked_since: float | None = None
    """When its key had been revoked, if it had been when this was made."""
    sent_at: float = 0.0
    whole_at: float | None = None
    """When its last byte was sent."""
    ended_at: float | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    """Whether the answer came to its end."""
    cut: bool = False
    """Whether the connection ended first."""
    left: bool = False
    """Whether the client left by itself."""

    @property
    def request_id(self) -> str:
        """Told to the gateway, so that its audit log can be compared."""
        return f"ask{self.number}"

    @property
    def marks(self) -> set[int]:
        """Of the generations that the answer's bytes come from."""
        return {int(found) for found in _MARK.findall(self.body)}

    @property
    def ended_cleanly(self) -> bool:
        """Whether a client would take a stream for whole."""
        return _ENDS.get(self.route, b"data: [DONE]\n") in self.body

    @property
    def error(self) -> str | None:
        """The code of a refusal."""
        if self.status == 200 or not self.whole:
            return None
        try:
            return str(json.loads(self.body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return "unreadable"

    def bytes(self) -> tuple[bytes, bytes]:
        """Head and body, as they are sent."""
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
