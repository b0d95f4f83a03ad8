"""Reads a client's body once, bounded and strictly, and lets through only fields known to be safe."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from aiohttp import web

from proxy.refusal import FieldNotAllowed, InvalidRequest, SlowRequest, TooLarge, UnsupportedMedia

MAX_DEPTH: Final = 64
"""Deepest nesting of a body; JSON schemas of tools need about ten."""

_SAMPLING = frozenset(
    [
        "allowed_token_ids",
        "bad_words",
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "max_tokens",
        "min_p",
        "min_tokens",
        "n",
        "presence_penalty",
        "prompt_logprobs",
        "repetition_penalty",
        "seed",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "stop",
        "stop_token_ids",
        "temperature",
        "top_k",
        "top_p",
        "truncate_prompt_tokens",
        "truncation_side",
    ]
)
_SHARED = _SAMPLING | frozenset(
    [
        "add_special_tokens",
        "cache_salt",
        "echo",
        "logprob_token_ids",
        "logprobs",
        "model",
        "response_format",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "stream",
        "stream_options",
        "structured_outputs",
    ]
)
PASSED: Final[Mapping[str, frozenset[str]]] = {
    "/v1/chat/completions": _SHARED
    | frozenset(
        [
            "add_generation_prompt",
            "chat_template_kwargs",
            "continue_final_message",
            "documents",
            "include_reasoning",
            "max_completion_tokens",
            "messages",
            "parallel_tool_calls",
            "reasoning_effort",
            "thinking_token_budget",
            "tool_choice",
            "tools",
            "top_logprobs",
        ]
    ),
    "/v1/completions": _SHARED | frozenset(("prompt", "suffix")),
}
"""Fields handed to the engine, by route. What is not here never reaches it."""

DROPPED: Final = frozenset(
    ["metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user", "verbosity"]
)
"""Fields of OpenAI's that say nothing to the engine: accepted, and not passed on."""

_CONTENT_PARTS = frozenset(("text", "refusal"))
_SALT = re.compile(r"[A-Za-z0-9_-]{1,32}")
_INTERNAL_HEADER = "x-interpretops-"


def check_headers(request: web.Request) -> None:
    """Refuse headers that belong to the gateway, and bodies that are not plain JSON."""
    for name in request.headers:
        if name.lower().startswith(_INTERNAL_HEADER):
            raise FieldNotAllowed(f"header {name} is internal to the gateway; remove it", param=name)
    if request.content_type != "application/json":
        raise UnsupportedMedia(f"Content-Type = {request.content_type!r}, but must be application/json")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnsupportedMedia(f"charset = {request.charset!r}, but must be utf-8")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("Content-Encoding is not supported; send the body uncompressed")


async def read_body(request: web.Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body, at most ``max_bytes`` of it."""
    if request.content_length is not None and request.content_length > max_bytes:
        raise TooLarge(f"body of {request.content_length} bytes, but at most {max_bytes} are accepted")
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.content.iter_any():
                size += len(part)
                if size > max_bytes:
                    raise TooLarge(f"body exceeds the {max_bytes} bytes that are accepted")
                parts.append(part)
    except TimeoutError:
        raise SlowRequest(f"the body did not arrive within {timeout_s:g} s") from None
    return b"".join(parts)


def parse_strict(data: bytes) -> dict[str, Any]:
    """A JSON object without duplicate keys, numbers that are none, or bottomless nesting."""
    try:
        body = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise InvalidRequest("the body holds a number that is too long") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    _check_depth(body)
    return body


def clean(route: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``body`` that the engine may see, values as the client sent them."""
    passed = PASSED[route]
    for name in body:
        if name not in passed and name not in DROPPED:
            raise FieldNotAllowed(
                f"field {name[:64]!r} may not be set on {route}; remove it from the request", param=name[:64]
            )
    if not isinstance(body.get("model"), str):
        raise InvalidRequest("model is missing; name one of GET /v1/models", param="model")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest("stream must be true or false", param="stream")
    salt = body.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and _SALT.fullmatch(salt)):
        raise InvalidRequest("cache_salt must be 1 to 32 of A-Z a-z 0-9 _ -", param="cache_salt")
    if "messages" in body:
        _check_messages(body["messages"])
    return {name: value for name, value in body.items() if name in passed and value is not None}


def serialize(body: Mapping[str, Any]) -> bytes:
    """JSON for the engine; refuses what only looked like JSON (1e999, half a surrogate pair)."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except (ValueError, UnicodeEncodeError):
        raise InvalidRequest("the body holds a number or a character that JSON cannot carry") from None


def _check_messages(messages: Any) -> None:
    """Only text: media would make the engine fetch addresses that a client names."""
    if not isinstance(messages, list):
        raise InvalidRequest("messages must be a list", param="messages")
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, list):
            continue
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, str) or kind in _CONTENT_PARTS:
                continue
            raise FieldNotAllowed(
                f"messages[{index}].content: part of type {str(kind)[:32]!r}, but only text is served",
                param=f"messages[{index}].content",
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise InvalidRequest(f"field {name[:64]!r} appears twice in one object", param=name[:64])
            seen.add(name)
    return result


def _no_constant(text: str) -> NoReturn:
    raise InvalidRequest(f"{text} is not a JSON number")


def _check_depth(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels")
