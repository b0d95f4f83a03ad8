"""Writes the events of a stream that a refusal gate stopped, in the form in which each API tells a refusal.

While nothing was stopped, events pass unchanged and are not parsed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from steering_kernels.vllm_plugin.core.refusal_stop import refusal_of
from steering_kernels.vllm_plugin.frontend.refused_answers import clear_choice, refusal_item, refused_response


class RefusedStream:
    """The events of one stream of a route whose choices carry their own stop reason."""

    def __init__(self, nonce: str) -> None:
        self._nonce = nonce

    def note(self, event: bytes) -> None:
        """Called with every event that is sent before anything was stopped."""

    def rewrite(self, event: bytes, text: str) -> Iterator[bytes]:
        """The events to send instead of one that came after something was stopped. Raises ValueError."""
        raise NotImplementedError


class _Choices(RefusedStream):
    def rewrite(self, event: bytes, text: str) -> Iterator[bytes]:
        _, data = _parse(event)
        for choice in () if data is None else data.get("choices", ()):
            own = refusal_of(choice.get("stop_reason"), self._nonce)
            if own is not None:
                clear_choice(choice)
                yield from self._refuse(data, choice, own)
                return
        yield event

    def _refuse(self, chunk: Any, choice: dict[str, Any], text: str) -> Iterator[bytes]:
        raise NotImplementedError


class _Chat(_Choices):
    def _refuse(self, chunk: Any, choice: dict[str, Any], text: str) -> Iterator[bytes]:
        for delta, end in (({"refusal": text}, None), ({}, "stop")):
            yield _event(None, {**chunk, "choices": [{**choice, "delta": delta, "finish_reason": end}]})


class _Completions(_Choices):
    def _refuse(self, chunk: Any, choice: dict[str, Any], text: str) -> Iterator[bytes]:
        yield _event(None, {**chunk, "choices": [{**choice, "text": text}]})


class _Messages(RefusedStream):
    """Of the blocks of content, only those that were begun before the stop are ended."""

    def __init__(self, nonce: str) -> None:
        super().__init__(nonce)
        self._blocks = 0

    def note(self, event: bytes) -> None:
        self._blocks += event.startswith(b"event: content_block_start\n")

    def rewrite(self, event: bytes, text: str) -> Iterator[bytes]:
        kind, data = _parse(event)
        if kind == "message_delta":
            yield from self._refuse(text)
            data["delta"] = {"stop_reason": "refusal", "stop_sequence": None}
            yield _event(kind, data)
        elif kind == "content_block_stop":
            if data["index"] < self._blocks:
                yield event
        elif kind not in ("content_block_start", "content_block_delta"):
            yield event

    def _refuse(self, text: str) -> Iterator[bytes]:
        block = {"type": "text", "text": ""}
        parts: list[dict[str, Any]] = [
            {"type": "content_block_start", "content_block": block},
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": text}},
            {"type": "content_block_stop"},
        ]
        for part in parts:
            yield _event(part["type"], {**part, "index": self._blocks})


class _Responses(RefusedStream):
    """Of the output items, only messages that were begun before the stop are ended, never tool calls."""

    def __init__(self, nonce: str) -> None:
        super().__init__(nonce)
        self._sent = 0
        self._items: list[dict[str, Any]] = []

    def note(self, event: bytes) -> None:
        self._sent += event.startswith(b"event: ")
        if event.startswith(b"event: response.output_item.added\n"):
            self._items.append(_parse(event)[1]["item"])

    def rewrite(self, event: bytes, text: str) -> Iterator[bytes]:
        kind, data = _parse(event)
        kept = {item["id"] for item in self._items if item["type"] in ("message", "reasoning")}
        if kind == "response.completed":
            item = refusal_item(text)
            done = [part for part in data["response"]["output"] if part.get("id") in kept]
            data["response"] = refused_response(data["response"], [*done, item])
            for part in (*self._refuse(item, text), data):
                yield self._numbered(part)
        elif kind in ("response.created", "response.in_progress"):
            yield self._numbered(data)
        elif kind.endswith(".done"):
            if (data.get("item_id") or data.get("item", {}).get("id")) in kept:
                yield self._numbered(data)
        elif not kind.startswith("response.output") and not kind.endswith((".delta", ".added")):
            yield event  # errors

    def _refuse(self, item: dict[str, Any], text: str) -> Iterator[dict[str, Any]]:
        begun = {**item, "status": "in_progress", "content": []}
        output: dict[str, Any] = {"output_index": len(self._items)}
        inside = {**output, "item_id": item["id"], "content_index": 0}
        empty = {"type": "refusal", "refusal": ""}
        yield {"type": "response.output_item.added", **output, "item": begun}
        yield {"type": "response.content_part.added", **inside, "part": empty}
        yield {"type": "response.refusal.delta", **inside, "delta": text}
        yield {"type": "response.refusal.done", **inside, "refusal": text}
        yield {"type": "response.content_part.done", **inside, "part": item["content"][0]}
        yield {"type": "response.output_item.done", **output, "item": item}

    def _numbered(self, data: dict[str, Any]) -> bytes:
        event = _event(data["type"], {**data, "sequence_number": self._sent})
        self._sent += 1
        return event


REFUSED_STREAMS: Final[Mapping[str, Callable[[str], RefusedStream]]] = {
    "/v1/chat/completions": _Chat,
    "/v1/completions": _Completions,
    "/v1/responses": _Responses,
    "/v1/messages": _Messages,
}
"""By route; takes the nonce."""


def _parse(event: bytes) -> tuple[str, Any]:
    """Name and data of an event; the name is empty if it has none, the data None for an end marker."""
    kind, data = "", None
    for line in event.split(b"\n"):
        if line.startswith(b"event: "):
            kind = line.removeprefix(b"event: ").decode()
        elif line.startswith(b"data: {"):
            data = json.loads(line.removeprefix(b"data: "))
    return kind, data


def _event(kind: str | None, data: Mapping[str, Any]) -> bytes:
    named = b"" if kind is None else b"event: " + kind.encode() + b"\n"
    return named + b"data: " + json.dumps(data).encode() + b"\n\n"
