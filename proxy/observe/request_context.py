"""Facts about one request for log, metrics, audit log and billing. Never prompts or answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from interpretops.engine_api import Receipt

_MAX_HELD: Final = 16 * 1024 * 1024
"""Longest answer that is stored, in bytes. A stream takes about 250 bytes per token."""


@dataclass
class Transcript:
    """Request and answer of one request, collected while it runs."""

    route: str
    body: Mapping[str, Any]
    size: int
    """Size of the request body as received, in bytes."""
    chunks: list[bytes] = field(default_factory=list)
    """The answer as sent."""
    too_long: bool = False
    """Whether the answer is too long to store; none of it is then kept."""
    _held: int = 0

    def add(self, chunk: bytes) -> None:
        """Add a part of the answer."""
        self._held += len(chunk)
        if self._held > _MAX_HELD:
            self.too_long = True
            self.chunks.clear()
        else:
            self.chunks.append(chunk)


@dataclass
class RequestContext:
    """Filled in by the handlers as the request proceeds."""

    request_id: str
    tenant: str = "none"
    """Id of a declared tenant, `anonymous` where no keys are required, or `none` if not authenticated."""
    key: str | None = None
    """Id of the API key used."""
    policy: str = "none"
    """Id of a policy in the catalogue, or `none`."""
    revision: str = "none"
    reason: str | None = None
    stream: bool = False
    engine_s: float = 0.0
    """Time spent waiting for the engine, or for the client to read."""
    tokens: int | None = None
    """Tokens that the engine processed, from its receipt; None before there is one."""
    evaluated: int = 0
    """Tokens at which the revision was evaluated, from the receipt."""
    edits: int = 0
    """(token, site) pairs that were edited, from the receipt."""
    gates: int = 0
    """(token, gate) pairs at which a conditional gate was open, from the receipt."""
    refusals: int = 0
    """Engine requests in which a refusal gate was open where the answer is generated, from the receipt."""
    nonce: str | None = None
    """Identifies the receipt; set once the request is sent to the engine."""
    keep_answer: bool = False
    """Whether to keep the answer for comparison with a shadow's."""
    answer: bytes | None = None
    """The answer, if kept for comparison. Discarded with the request."""
    transcript: Transcript | None = None
    """Request and answer, if the tenant keeps transcripts. Discarded with the request."""
    model: str | None = None
    """The requested model, once it is known to exist."""
    engine_headers: dict[str, str] = field(default_factory=dict)
    """Extra headers for the engine: the trace context."""
    headers: dict[str, str] = field(default_factory=dict)
    """Extra headers of the response."""
    ttft_s: float | None = None
    began_at: float = 0.0

    def take(self, receipt: Receipt) -> None:
        """Store the engine's figures, whether or not the receipt proves the answer."""
        self.tokens, self.evaluated = receipt.tokens, receipt.tokens_evaluated
        self.edits, self.gates = receipt.edits_applied, receipt.gates_fired
        self.refusals = receipt.refusals


REQUEST_CONTEXT: web.RequestKey[RequestContext] = web.RequestKey("context", RequestContext)
