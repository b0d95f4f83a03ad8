"""Checks messages, inputs and tools: only text passes, and nothing that makes the engine fetch a URL.

Only listed keys reach the engine. A content part may hold the keys of its type, and keys that clients add
and no engine reads. Other keys of a message (ids, times) are removed. Types are checked before values, since
any JSON may appear anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from proxy.errors import FieldNotAllowed, InvalidRequest

_CLIENT_KEYS: Final = frozenset(
    [
        "annotations",
        "cache_control",
        "citations",
        "extras",
        "id",
        "index",
        "logprobs",
        "metadata",
        "prompt_cache_breakpoint",
        "providerMetadata",
        "providerOptions",
        "provider_metadata",
        "provider_options",
        "status",
    ]
)
"""Keys that clients add to content parts and that change no answer."""


def _part(text_key: str, *more: str) -> tuple[str, frozenset[str]]:
    return text_key, frozenset(("type", text_key, *more)) | _CLIENT_KEYS


_PARTS: Final[Mapping[str, tuple[str, frozenset[str]]]] = {
    "text": _part("text"),
    "input_text": _part("text"),
    "output_text": _part("text"),
    "summary_text": _part("text"),
    "reasoning_text": _part("text"),
    "refusal": _part("refusal"),
    "thinking": _part("thinking", "signature", "closed"),
    "redacted_thinking": _part("data"),
    "tool_use": _part("name", "input", "caller", "toolset_name"),
    "tool_result": _part("tool_use_id", "content", "is_error", "caller", "toolset_name"),
}
"""Content part types that are text: the key that holds the text, and all allowed keys."""
_MESSAGE: Final = frozenset(
    [
        "content",
        "function_call",
        "name",
        "reasoning",
        "reasoning_content",
        "refusal",
        "role",
        "tool_call_id",
        "tool_calls",
        "tools",
    ]
)
_ITEMS: Final[Mapping[str, frozenset[str]]] = {
    "message": frozenset(("type", "role", "content", "id", "status", "phase", "name")),
    "function_call": frozenset(
        ("type", "arguments", "call_id", "name", "id", "status", "namespace", "caller", "async")
    ),
    "function_call_output": frozenset(
        ("type", "call_id", "output", "id", "status", "name", "namespace", "caller")
    ),
    "reasoning": frozenset(("type", "id", "summary", "content", "encrypted_content", "status")),
}
"""Items of a Responses input that hold no URL and refer to nothing stored, with their allowed keys."""
_NON_TEXT_KEYS: Final = frozenset(
    [
        "attachments",
        "audio",
        "audio_embeds",
        "audio_url",
        "document",
        "file",
        "file_data",
        "file_id",
        "file_url",
        "files",
        "image",
        "image_embeds",
        "image_pil",
        "image_url",
        "images",
        "input_audio",
        "input_file",
        "input_image",
        "prompt_embeds",
        "source",
        "video",
        "video_embeds",
        "video_url",
        "videos",
    ]
)
"""Keys for content other than text. These are refused: if removed, callers would think it was read."""
_POSSIBLE_LABELS: Final = frozenset(("document", "file", "files", "source"))
"""The keys among them that apps also use for a name or number of their own."""
_EMPTY: Final[tuple[Any, ...]] = (None, "", [], {})


def check_messages(body: Mapping[str, Any]) -> None:
    """Allow only text in ``messages`` and ``system``. Removes keys that no engine reads."""
    for index, message in enumerate(_list(body.get("messages"), "messages")):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{where} must be an object", param=where)
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{where}.role must be a string", param=f"{where}.role")
        _keep(message, _MESSAGE, where)
        _check_content(message.get("content"), f"{where}.content")
        _check_tools(message.get("tools"), f"{where}.tools")
        for name in ("name", "reasoning", "reasoning_content", "refusal", "tool_call_id"):
            _check_text(message, name, where)
        for place, call in enumerate(_list(message.get("tool_calls"), f"{where}.tool_calls")):
            _check_call(call, f"{where}.tool_calls[{place}]")
    _check_content(body.get("system"), "system")


def check_input(body: Mapping[str, Any]) -> None:
    """Allow only messages, function calls and their results in ``input``, all of them text."""
    items = body.get("input")
    if isinstance(items, str):
        return
    if not isinstance(items, list):
        raise InvalidRequest("input must be a string or a list", param="input")
    for index, item in enumerate(items):
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{where} must be an object", param=where)
        kind = item.get("type", "message")
        if not isinstance(kind, str) or kind not in _ITEMS:
            raise _refused(where, kind)
        _keep(item, _ITEMS[kind], where)
        for name in ("content", "output", "summary"):
            _check_content(item.get(name), f"{where}.{name}")


def check_tools(body: Mapping[str, Any]) -> None:
    """Allow only functions, which the client runs. The engine would call a tool server's URL itself."""
    _check_tools(body.get("tools"), "tools")


def _check_tools(tools: Any, where: str) -> None:
    for index, tool in enumerate(_list(tools, where)):
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        if kind not in ("function", "custom"):
            raise FieldNotAllowed(
                f"{where}[{index}]: type {str(kind)[:32]!r}, but only functions that the client runs "
                "are supported",
                param=f"{where}[{index}]",
            )


def _check_content(content: Any, where: str) -> None:
    if content is None or isinstance(content, str):
        return
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list", param=where)
    for part in content:
        if not isinstance(part, str):
            _check_part(part, where)


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        raise _refused(where, kind)
    text_key, keys = _PARTS[kind]
    for name in [name for name in part if name not in keys]:
        if name in _NON_TEXT_KEYS and part[name] not in _EMPTY:
            raise FieldNotAllowed(
                f"{where}: part of type {kind!r} holds {name[:64]!r}, but only text is supported; remove it",
                param=where,
            )
        del part[name]
    _check_text(part, text_key, where)
    if kind == "tool_result":
        _check_content(part.get("content"), where)


def _check_call(call: Any, where: str) -> None:
    if not isinstance(call, dict):
        raise InvalidRequest(f"{where} must be an object", param=where)
    for name in ("id", "type"):
        _check_text(call, name, where)
    for name in ("function", "custom"):
        if not isinstance(call.get(name, {}), dict | None):
            raise InvalidRequest(f"{where}.{name} must be an object", param=f"{where}.{name}")


def _keep(found: dict[str, Any], keys: frozenset[str], where: str) -> None:
    """Remove keys of a message that are not in ``keys``; refuse those that hold content other than text."""
    for name in [name for name in found if name not in keys]:
        label = name in _POSSIBLE_LABELS and not isinstance(found[name], dict | list)
        if name in _NON_TEXT_KEYS and found[name] not in _EMPTY and not label:
            raise FieldNotAllowed(
                f"{where} holds {name!r}, but only text is supported; remove it", param=f"{where}.{name}"
            )
        del found[name]


def _check_text(found: Mapping[str, Any], name: str, where: str) -> None:
    if not isinstance(found.get(name), str | None):
        raise InvalidRequest(f"{where}: {name} must be a string", param=where)


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidRequest(f"{where} must be a list", param=where)
    return value


def _refused(where: str, kind: Any) -> FieldNotAllowed:
    text = f"{where}: part of type {str(kind)[:32]!r}, but only text is supported"
    return FieldNotAllowed(text, param=where)
