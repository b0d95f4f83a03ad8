"""Judges an answer: steered and proven, refused in OpenAI's format, truncated, or wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from faults.marker import POLICY, steered_only
from proxy.errors import EngineFailed, EngineTimeout

Kind = Literal["steered", "refused", "broken_off", "unsteered", "misshapen", "listed", "unfinished"]
"""`listed`: the model list, not generated. `unfinished`: no answer, because the request's headers were
incomplete."""
_ERROR_FIELDS = {"message", "type", "param", "code"}
_ENDS = ("data: [DONE]", "event: response.completed", "event: message_stop")


@dataclass(frozen=True)
class Judgement:
    """The kind of an answer, and if it is wrong, why."""

    kind: Kind
    why: str = ""
    reported: str = ""
    """Code and message that the caller got for an engine failure."""


def judge(status: int, headers: Mapping[str, str], text: str) -> Judgement:
    """Judge one whole answer. ``headers`` finds names in any case."""
    if status != 200:
        return _judge_refusal(status, headers, text)
    label = headers.get("X-Steering-Policy", "")
    if not re.fullmatch(f"{POLICY}@[0-9a-f]{{12}}", label):
        return Judgement("unsteered", f"its policy is {label!r}")
    streamed = headers.get("Content-Type", "").startswith("text/event-stream")
    events = [event for event in text.split("\n\n") if event] if streamed else []
    said = "".join(_texts_of_events(events) if streamed else _texts_of_body(json.loads(text)))
    if not steered_only(said):
        return Judgement("unsteered", f"it says {said[:80]!r}")
    if not streamed:
        return _judge_proof(label, headers.get("X-Steering-Receipt", "null"), said)
    if any(event.startswith(_ENDS) for event in events):
        receipts = [
            event.removeprefix(": steering-receipt ")
            for event in events
            if event.startswith(": steering-receipt ")
        ]
        if len(receipts) != 1 or not events[-1].startswith(_ENDS):
            return Judgement("unsteered", f"{len(receipts)} receipts before its end")
        return _judge_proof(label, receipts[0], said)
    last = events[-1].partition("data: ")[2] if events else ""
    why = _shape(last)
    if why is None:
        return Judgement("broken_off", reported=_error_text(last))
    return Judgement("misshapen", f"stream ends in {why}")


def _judge_proof(label: str, text: str, said: str) -> Judgement:
    receipt = json.loads(text) or {}
    if f"{receipt.get('policy')}@{receipt.get('revision', '')[:12]}" != label:
        return Judgement("unsteered", f"its receipt is {receipt}")
    if receipt["edits_applied"] < 1 or not said:
        return Judgement("unsteered", f"edits {receipt['edits_applied']}, {len(said)} characters")
    return Judgement("steered")


def _judge_refusal(status: int, headers: Mapping[str, str], text: str) -> Judgement:
    why = _shape(text)
    if why is None and not headers.get("X-Request-Id"):
        why = "no X-Request-Id"
    if why is None and status == 500:
        why = "an internal error"
    if why is not None:
        return Judgement("misshapen", f"status {status}: {why}")
    reported = _error_text(text)
    return Judgement(
        "refused", reported=reported if reported.startswith((EngineFailed.code, EngineTimeout.code)) else ""
    )


def _error_text(text: str) -> str:
    error = json.loads(text)["error"]
    return f"{error['code']}: {error['message']}"


def _shape(text: str) -> str | None:
    """Why ``text`` is not an error in OpenAI's format; None if it is one."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return f"no error object: {text[:80]!r}"
    return None if error.keys() == _ERROR_FIELDS else f"an error of {sorted(error)}"


def _texts_of_events(events: list[str]) -> Iterator[str]:
    for event in events:
        data = event.rpartition("data: ")[2]
        if not data.startswith("{"):
            continue
        found = json.loads(data)
        if found.get("type") == "response.output_text.delta":
            yield found["delta"]
        elif "choices" in found or found.get("type") == "content_block_delta":
            yield from _texts_of_body(found)


def _texts_of_body(body: dict[str, Any]) -> Iterator[str]:
    """The generated text, on any route."""
    for choice in body.get("choices", ()):
        message = choice.get("message") or choice.get("delta") or {}
        yield choice.get("text") or message.get("content") or ""
    for item in body.get("output", ()):
        for part in item.get("content") or ():
            yield part.get("text") or ""
    content = body.get("content") or [body.get("delta", {})]
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            yield part.get("text") or ""
