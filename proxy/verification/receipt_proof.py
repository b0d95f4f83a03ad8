"""Whether a receipt proves a whole answer: every engine request, to its end, and every reported token."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from interpretops.engine_api import PASS_THROUGH, Receipt
from proxy.openai_api.request_size import Size
from proxy.openai_api.sse import SseSplitter

_READ_AT_ONCE: Final = 256 * 1024
"""Longest answer, in bytes, that is parsed on the event loop; longer ones are parsed in a thread."""
_EVENTS_AROUND: Final = 16
_EVENTS_PER_REQUEST: Final = 8
"""Most events without a new token in a stream of unnamed events: per stream, and per engine request."""


@dataclass(frozen=True)
class AnswerUsage:
    """What an answer reports about its own size; 0 where it reports nothing."""

    prompt_tokens: int = 0
    """Tokens of all prompts, each counted once, however many choices it has."""
    completion_tokens: int = 0
    """Tokens of all choices."""
    events: int = 0
    """Events of a stream in which each carries a token."""


async def answer_usage(answer: bytes) -> AnswerUsage:
    """The usage reported by a whole answer. Raises `ValueError` if it is not a JSON object."""
    if len(answer) > _READ_AT_ONCE:
        return await asyncio.to_thread(_parse_usage, answer)
    return _parse_usage(answer)


def stream_usage(splitter: SseSplitter, *, named: bool) -> AnswerUsage:
    """The usage reported by a finished stream, in its last event or its end event."""
    found = AnswerUsage(events=0 if named else splitter.events)
    for event in (splitter.last_event, splitter.end_event):
        for line in event.split(b"\n"):
            if line.startswith(b"data: {"):
                usage = _usage(json.loads(line.removeprefix(b"data: ")))
                found = AnswerUsage(
                    max(found.prompt_tokens, usage.prompt_tokens),
                    max(found.completion_tokens, usage.completion_tokens),
                    found.events,
                )
    return found


def receipt_fault(receipt: Receipt | None, required: str, size: Size, usage: AnswerUsage) -> str | None:
    """Why a receipt does not prove an answer under ``required`` (64 hex, or `none`); None when it does.

    Every token of prompt and answer passes through the model or comes from its cache, except the last of each
    sequence, which is only sampled. Tokens recomputed after a preemption count again: it is a lower bound.
    """
    if receipt is None:
        return "no receipt"
    if receipt.revision != required:
        return f"receipt is for revision {receipt.revision[:64]!r}"
    if receipt.requests != size.requests or not receipt.finished:
        return (
            f"receipt covers {receipt.requests} requests, finished = {receipt.finished}, "
            f"but {size.prompts} prompts with {size.choices} choices each are {size.requests}"
        )
    if required != PASS_THROUGH and receipt.tokens_evaluated < size.requests:
        return (
            f"receipt says that {receipt.tokens_evaluated} tokens were evaluated for {size.requests} requests"
        )
    reported_tokens = usage.prompt_tokens * size.choices + usage.completion_tokens - size.requests
    streamed_tokens = usage.events - _EVENTS_PER_REQUEST * size.requests - _EVENTS_AROUND
    least = max(reported_tokens, streamed_tokens)
    if receipt.tokens < least:
        return f"receipt is for {receipt.tokens} tokens, but the answer took at least {least}"
    return None


def _parse_usage(answer: bytes) -> AnswerUsage:
    return _usage(json.loads(answer))


def _usage(content: Any) -> AnswerUsage:
    """Parse `usage` of OpenAI's and Anthropic's routes; all 0 if there is none."""
    if not isinstance(content, dict):
        raise ValueError("the answer is not a JSON object")  # noqa: TRY004 - of JSON, not of an argument
    inner = content.get("response")
    usage = (inner if isinstance(inner, dict) else content).get("usage")
    if not isinstance(usage, dict):
        return AnswerUsage()
    return AnswerUsage(
        _count(usage, "prompt_tokens", "input_tokens"), _count(usage, "completion_tokens", "output_tokens")
    )


def _count(usage: Mapping[str, Any], *names: str) -> int:
    values = [usage[name] for name in names if name in usage]
    return max((value for value in values if isinstance(value, int)), default=0)
