"""Looks into messages, inputs and tools: only text, and nothing that makes the engine fetch an address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from proxy.refusal import FieldNotAllowed, InvalidRequest

_TEXTS: Final = frozenset(("text", "refusal", "input_text", "output_text", "summary_text", "reasoning_text"))
_NESTED: Final = frozenset(("tool_result",))
_BLOCKS: Final = frozenset(("tool_use", "thinking", "redacted_thinking"))
"""Parts of Anthropic's messages that hold no address."""
_ITEMS: Final = frozenset(("message", "function_call", "function_call_output", "reasoning"))
"""Items of a Responses input that hold no address and refer to nothing stored."""


def check_messages(body: Mapping[str, Any]) -> None:
    """Of ``messages`` and ``system`` only text is served."""
    messages = body.get("messages")
    if messages is not None and not isinstance(messages, list):
        raise InvalidRequest("messages must be a list", param="messages")
    for index, message in enumerate(messages or ()):
        content = message.get("content") if isinstance(message, dict) else None
        _check_parts(content, f"messages[{index}].content")
    _check_parts(body.get("system"), "system")


def check_input(body: Mapping[str, Any]) -> None:
    """Of ``input`` only messages, function calls and what they returned, all of it text."""
    given = body.get("input")
    if isinstance(given, str):
        return
    if not isinstance(given, list):
        raise InvalidRequest("input must be a text or a list", param="input")
    for index, item in enumerate(given):
        where = f"input[{index}]"
        if not isinstance(item, dict):
            raise InvalidRequest(f"{where} must be an object", param=where)
        kind = item.get("type", "message")
        if kind not in _ITEMS:
            raise _refused(where, kind)
        for name in ("content", "output", "summary"):
            _check_parts(item.get(name), f"{where}.{name}")


def check_tools(body: Mapping[str, Any]) -> None:
    """Only functions, which the client runs; a server's address would be called by the engine."""
    tools = body.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise InvalidRequest("tools must be a list", param="tools")
    for index, tool in enumerate(tools or ()):
        kind = tool.get("type", "function") if isinstance(tool, dict) else None
        if kind not in ("function", "custom"):
            raise FieldNotAllowed(
                f"tools[{index}]: type {str(kind)[:32]!r}, but only functions run by the client are served",
                param=f"tools[{index}]",
            )


def _check_parts(content: Any, where: str) -> None:
    if not isinstance(content, list):
        return
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str) or kind in _TEXTS or kind in _BLOCKS:
            continue
        if kind in _NESTED:
            _check_parts(part.get("content"), where)
            continue
        raise _refused(where, kind)


def _refused(where: str, kind: Any) -> FieldNotAllowed:
    return FieldNotAllowed(f"{where}: part of type {str(kind)[:32]!r}, but only text is served", param=where)
