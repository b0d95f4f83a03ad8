"""The plugin's arguments of a request: its revision, and the nonce of its receipt."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from interpretops.engine_api import NONCE_KEY, PASS_THROUGH, REVISION_KEY, EngineCode

_REVISION = re.compile(r"[0-9a-f]{64}")
_NONCE = re.compile(r"[0-9a-f]{16,64}")


class RequestArgsError(ValueError):
    """The request does not name a revision, or its arguments are malformed."""

    code: ClassVar[EngineCode] = EngineCode.INVALID_SEAL


@dataclass(frozen=True)
class RequestArgs:
    """A request's validated arguments."""

    revision: str | None
    """None: no steering (pass-through)."""
    nonce: str

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> RequestArgs:
        """Read `SamplingParams.extra_args`. Raises `RequestArgsError`, also for a missing revision."""
        args = extra_args or {}
        revision, nonce = args.get(REVISION_KEY), args.get(NONCE_KEY)
        if not isinstance(revision, str) or not (revision == PASS_THROUGH or _REVISION.fullmatch(revision)):
            raise RequestArgsError(
                f"vllm_xargs.{REVISION_KEY} = {revision!r}, but every request must name "
                f"a revision (64 hex digits) or {PASS_THROUGH!r}"
            )
        if not isinstance(nonce, str) or not _NONCE.fullmatch(nonce):
            raise RequestArgsError(f"vllm_xargs.{NONCE_KEY} must be 16 to 64 hex digits")
        return cls(None if revision == PASS_THROUGH else revision, nonce)


def compose_cache_salt(revision: str | None, client_salt: str | None) -> str | None:
    """The prefix-cache salt of a request, from its revision and the client's own salt.

    Blocks written under a revision hold edited keys and values, which no other revision may reuse.
    """
    if revision is None:
        # Hashed, so that a client's salt cannot equal a revision's salt.
        return None if client_salt is None else "c" + _short(client_salt)
    return "r" + revision if client_salt is None else "r" + revision + "c" + _short(client_salt)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
