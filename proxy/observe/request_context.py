"""What is known of a request by its end, for log, metrics, audit and bill. Never what it said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from interpretops.engine_api import Receipt

_MOST_HELD: Final = 16 * 1024 * 1024
"""Bytes of an answer to be stored: a stream takes about 250 for each token."""


@dataclass
class Transcript:
    """What a request said, while it runs."""

    route: str
    body: Mapping[str, Any]
    size: int
    """Of the body as it came, in bytes."""
    chunks: list[bytes] = field(default_factory=list)
    """The answer as it was sent."""
    too_long: bool = False
    """Whether the answer is longer than what is held of one; nothing of it is, then."""
    _held: int = 0

    def add(self, chunk: bytes) -> None:
        """More of the answer."""
        self._held += len(chunk)
        if self._held > _MOST_HELD:
            self.too_long = True
            self.chunks.clear()
        else:
            self.chunks.append(chunk)


@dataclass
class Trail:
    """Filled by whoever handles the request."""

    request_id: str
    tenant: str = "none"
    """Id of a declared tenant, `anonymous` without keys, or `none` when nobody was identified."""
    key: str | None = None
    """Id of the key that was shown."""
    policy: str = "none"
    """Id of a policy in the catalogue, or `none`."""
    revision: str = "none"
    reason: str | None = None
    stream: bool = False
    engine_s: float = 0.0
    """Time spent waiting for the engine or the client's reading."""
    tokens: int | None = None
    """Tokens that the engine worked through, as its receipt says; None as long as there is none."""
    evaluated: int = 0
    """Tokens at which the revision was evaluated, as the receipt says."""
    edits: int = 0
    """(token, site) pairs that were changed, as the receipt says."""
    gates: int = 0
    """(token, gate) pairs at which a conditional gate was open, as the receipt says."""
    nonce: str | None = None
    """Names the receipt, once the request was sent to the engine."""
    keep_answer: bool = False
    """Whether the answer is to be compared with a shadow's."""
    answer: bytes | None = None
    """The answer, where it is to be compared; forgotten with the request."""
    transcript: Transcript | None = None
    """What was said, where the tenant has it kept; forgotten with the request."""
    model: str | None = None
    """The model that was asked for, once it is known to be one."""
    engine_headers: dict[str, str] = field(default_factory=dict)
    """What the engine is told besides: which trace the request belongs to."""
    headers: dict[str, str] = field(default_factory=dict)
    """Further headers of the answer."""
    ttft_s: float | None = None
    began_at: float = 0.0

    def take(self, receipt: Receipt) -> None:
        """Note what the engine did, whether or not it was what was demanded."""
        self.tokens, self.evaluated = receipt.tokens, receipt.tokens_evaluated
        self.edits, self.gates = receipt.edits_applied, receipt.gates_fired


TRAIL: web.RequestKey[Trail] = web.RequestKey("trail", Trail)
