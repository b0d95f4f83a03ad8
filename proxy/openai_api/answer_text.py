"""Extracts the generated text from an answer of any route, streamed or not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

_TEXT_FIELDS: Final = frozenset(
    [
        "text",
        "content",
        "reasoning",
        "reasoning_content",
        "refusal",
        "arguments",
        "partial_json",
        "thinking",
        "delta",
    ]
)
"""Fields of answers and events that carry text the model generated."""
_CALL_TYPES: Final = ("tool_use", "custom_tool_call")
"""Tool calls whose arguments are in `input`, an object or a string."""
_GENERATED_FIELDS: Final = ("choices", "output", "content")
"""Top-level fields with generated text. Some routes repeat the request in other fields."""
_INDEX_FIELDS: Final = ("index", "output_index", "content_index")
"""Fields that say which of several texts an event continues."""
Key = tuple[str | int, ...]


def answer_texts(answer: bytes, *, streamed: bool) -> list[str]:
    """The generated text: one string for each choice, block or tool call, with stream pieces joined."""
    found: dict[Key, list[str]] = {}
    for body in _events(answer) if streamed else [answer]:
        try:
            value = json.loads(body)
        except ValueError:
            continue
        if not isinstance(value, dict) or (streamed and _repeats(value)):
            continue
        generated = value if streamed else {n: value[n] for n in _GENERATED_FIELDS if n in value}
        for key, text in _pieces(generated, ()):
            found.setdefault(key, []).append(text)
    return ["".join(pieces) for pieces in found.values()]


def _events(stream: bytes) -> Iterator[bytes]:
    return (line[5:] for line in stream.split(b"\n") if line.startswith(b"data:"))


def _repeats(event: dict[str, Any]) -> bool:
    """Whether an event only frames or repeats text that other events deliver in pieces."""
    kind = str(event.get("type"))
    return kind == "content_block_start" or (kind.startswith("response.") and not kind.endswith(".delta"))


def _pieces(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, dict):
        at = (*key, *(value[name] for name in _INDEX_FIELDS if isinstance(value.get(name), int)))
        for name, child in value.items():
            if name == "input" and value.get("type") in _CALL_TYPES:
                yield (*at, name), child if isinstance(child, str) else json.dumps(child, ensure_ascii=False)
            elif isinstance(child, str):
                if name in _TEXT_FIELDS:
                    yield (*at, name), child
            else:
                yield from _pieces(child, (*at, name))
    elif isinstance(value, list):
        for place, child in enumerate(value):
            yield from _pieces(child, (*key, place))
