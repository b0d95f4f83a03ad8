"""Whether a receipt proves all of an answer: every engine request of it, to its end, and every token told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from interpretops.engine_api import Receipt
from proxy.openai_api.request_size import Size
from proxy.openai_api.sse import SseSplitter
from proxy.policies.binding import NONE

_READ_AT_ONCE: Final = 256 * 1024
"""Bytes of an answer that are parsed on the event loop; more of them take a thread."""
_EVENTS_AROUND: Final = 16
_EVENTS_PER_REQUEST: Final = 8
"""Most events of an unnamed stream, in all and for each engine request, that carry no new token."""


@dataclass(frozen=True)
class Told:
    """What an answer itself says of its size, as far as it does."""

    prompt_tokens: int = 0
    """Of every prompt once, however many choices each has."""
    completion_tokens: int = 0
    """Of all choices."""
    events: int = 0
    """Of a stream whose events carry a token each."""


async def told_by(answer: bytes) -> Told:
    """What a whole answer says. Raises `ValueError` when it is no JSON object."""
    if len(answer) > _READ_AT_ONCE:
        return await asyncio.to_thread(_told_by, answer)
    return _told_by(answer)


def told_by_stream(splitter: SseSplitter, *, named: bool) -> Told:
    """What a stream that has ended says, in its last event or the one that ended it."""
    found = Told(events=0 if named else splitter.events)
    for event in (splitter.last_event, splitter.end_event):
        for line in event.split(b"\n"):
            if line.startswith(b"data: {"):
                told = _usage(json.loads(line.removeprefix(b"data: ")))
                found = Told(
                    max(found.prompt_tokens, told.prompt_tokens),
                    max(found.completion_tokens, told.completion_tokens),
                    found.events,
                )
    return found


def fault(receipt: Receipt | None, demanded: str, size: Size, told: Told) -> str | None:
    """Why a receipt does not prove an answer under ``demanded`` (64 hex, or `none`); None when it does.

    Every token of prompt and answer passes the model or comes from its cache, but for the last of each
    sequence, which was only sampled. What is computed again after a preemption counts again: it is a lower
    bound.
    """
    if receipt is None:
        return "no receipt"
    if receipt.revision != demanded:
        return f"receipt is for revision {receipt.revision[:64]!r}"
    if receipt.requests != size.requests or not receipt.finished:
        return (
            f"receipt covers {receipt.requests} requests, finished = {receipt.finished}, "
            f"but {size.prompts} prompts with {size.choices} choices each are {size.requests}"
        )
    if demanded != NONE and receipt.tokens_evaluated < size.requests:
        return (
            f"receipt says that {receipt.tokens_evaluated} tokens were evaluated for {size.requests} requests"
        )
    told_tokens = told.prompt_tokens * size.choices + told.completion_tokens - size.requests
    streamed_tokens = told.events - _EVENTS_PER_REQUEST * size.requests - _EVENTS_AROUND
    least = max(told_tokens, streamed_tokens)
    if receipt.tokens < least:
        return f"receipt is for {receipt.tokens} tokens, but the answer took at least {least}"
    return None


def _told_by(answer: bytes) -> Told:
    return _usage(json.loads(answer))


def _usage(content: Any) -> Told:
    """`usage`, as OpenAI's and Anthropic's routes write it; none of it is no usage."""
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 - of JSON, not of an argument
    inner = content.get("response")
    usage = (inner if isinstance(inner, dict) else content).get("usage")
    if not isinstance(usage, dict):
        return Told()
    return Told(
        _count(usage, "prompt_tokens", "input_tokens"), _count(usage, "completion_tokens", "output_tokens")
    )


def _count(usage: Mapping[str, Any], *names: str) -> int:
    values = [usage[name] for name in names if name in usage]
    return max((value for value in values if isinstance(value, int)), default=0)
