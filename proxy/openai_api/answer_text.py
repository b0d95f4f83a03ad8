"""The texts of an answer, whole or in events, whatever route it came by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

_TEXTS: Final = frozenset(
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
"""Names under which the routes' answers and their events carry what the model wrote."""
_CALLS: Final = ("tool_use", "custom_tool_call")
"""Calls that carry what they were called with as `input`, an object or a text."""
_SPOKEN: Final = ("choices", "output", "content")
"""Where a whole answer holds what the model wrote; beside it some routes repeat what was asked."""
_PLACES: Final = ("index", "output_index", "content_index")
"""Which of several texts an event goes on with."""
Key = tuple[str | int, ...]


def texts_said(answer: bytes, *, streamed: bool) -> list[str]:
    """What the model wrote, one text for each choice, block or call; pieces of a stream put together."""
    found: dict[Key, list[str]] = {}
    for body in _events(answer) if streamed else [answer]:
        try:
            value = json.loads(body)
        except ValueError:
            continue
        if not isinstance(value, dict) or (streamed and _repeats(value)):
            continue
        said = value if streamed else {name: value[name] for name in _SPOKEN if name in value}
        for key, text in _pieces(said, ()):
            found.setdefault(key, []).append(text)
    return ["".join(pieces) for pieces in found.values()]


def _events(stream: bytes) -> Iterator[bytes]:
    return (line[5:] for line in stream.split(b"\n") if line.startswith(b"data:"))


def _repeats(event: dict[str, Any]) -> bool:
    """Whether an event only frames or repeats what others bring piece by piece."""
    kind = str(event.get("type"))
    return kind == "content_block_start" or (kind.startswith("response.") and not kind.endswith(".delta"))


def _pieces(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, dict):
        at = (*key, *(value[name] for name in _PLACES if isinstance(value.get(name), int)))
        for name, child in value.items():
            if name == "input" and value.get("type") in _CALLS:
                yield (*at, name), child if isinstance(child, str) else json.dumps(child, ensure_ascii=False)
            elif isinstance(child, str):
                if name in _TEXTS:
                    yield (*at, name), child
            else:
                yield from _pieces(child, (*at, name))
    elif isinstance(value, list):
        for place, child in enumerate(value):
            yield from _pieces(child, (*key, place))
