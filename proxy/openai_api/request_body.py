"""Reads and strictly parses a request body within bounds, and passes on only fields known to be safe."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from aiohttp import web

from interpretops.engine_api import INTERNAL_HEADERS
from interpretops.settings import GatewaySettings
from proxy.errors import FieldNotAllowed, InvalidRequest, SlowRequest, TooLarge, UnsupportedMedia
from proxy.openai_api.routes import DROPPED, Route

MAX_DEPTH: Final = 64
"""Deepest nesting of a body. JSON schemas of tools need about ten levels."""
MAX_VALUES: Final[int] = GatewaySettings.model_fields["max_body_values"].default
"""Default for the largest number of JSON values in a body."""
_KEY_VALUES: Final = 4
_CONTAINER_VALUES: Final = 8
"""Parsing cost of a key, and of an object or list, relative to a number."""

SALT_PATTERN: Final = "[A-Za-z0-9_-]{1,32}"
_SALT = re.compile(SALT_PATTERN)


def check_headers(request: web.Request) -> None:
    """Refuse the gateway's internal headers, and bodies that are not plain JSON."""
    for name in request.headers:
        if name.lower().startswith(INTERNAL_HEADERS):
            raise FieldNotAllowed(f"header {name} is internal to the gateway; remove it", param=name)
    if request.content_type != "application/json":
        raise UnsupportedMedia(f"Content-Type = {request.content_type!r}, but must be application/json")
    if (request.charset or "utf-8").lower() not in ("utf-8", "utf8"):
        raise UnsupportedMedia(f"charset = {request.charset!r}, but must be utf-8")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise UnsupportedMedia("Content-Encoding is not supported; send the body uncompressed")


async def read_body(request: web.Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. Raises `TooLarge` over ``max_bytes``, and `SlowRequest` after ``timeout_s``."""
    if request.content_length is not None and request.content_length > max_bytes:
        raise TooLarge(f"the body has {request.content_length} bytes, but at most {max_bytes} are accepted")
    if request.content.is_eof():
        # The body arrived together with the headers, as it usually does.
        whole = request.content.read_nowait()
        if len(whole) > max_bytes:
            raise TooLarge(f"body exceeds the {max_bytes} bytes that are accepted")
        return whole
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


def parse_strict(data: bytes, *, max_values: int = MAX_VALUES) -> dict[str, Any]:
    """Parse a JSON object. Refuses duplicate keys, NaN, infinity, deep nesting and too many values.

    Parsing blocks the event loop for a time that grows with the number of values, not with the size in bytes.
    """
    deep = _count(data, max_values) > MAX_DEPTH
    try:
        body = _DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError:
        raise InvalidRequest("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError:
        raise InvalidRequest("the body holds a number with too many digits") from None
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    if deep:
        _check_depth(body)
    return body


def _count(data: bytes, max_values: int) -> int:
    """An upper bound on the objects and lists in a body. Refuses a body with too many values.

    Counts without parsing: each value follows a comma or opens its container. Characters inside strings are
    only excluded when the plain count is over the limit.
    """
    structure = data.translate(None, _NOT_STRUCTURE)
    if _values(structure) > max_values:
        structure = data.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _NOT_STRUCTURE)
        # Each value has at most two strings: its key and itself.
        if structure.count(b'"') <= 4 * max_values:
            structure = b"".join(structure.split(b'"')[::2])
        if _values(structure) > max_values:
            raise TooLarge(
                f"the body holds more than {max_values} values (gateway.max_body_values; a key counts as "
                f"{_KEY_VALUES}, an object or list as {_CONTAINER_VALUES}); send a smaller request"
            )
    return structure.count(b"{") + structure.count(b"[")


def _values(structure: bytes) -> int:
    containers = structure.count(b"{") + structure.count(b"[")
    return structure.count(b",") + _KEY_VALUES * structure.count(b":") + _CONTAINER_VALUES * containers


def clean(route: Route, body: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``body`` that the engine may see, with their values unchanged."""
    for name, value in body.items():
        if value is not None and name not in route.fields and name not in DROPPED:
            raise FieldNotAllowed(
                f"field {name[:64]!r} may not be set on {route.path}; remove it from the request",
                param=name[:64],
            )
    if not isinstance(body.get("model"), str):
        raise InvalidRequest("model is missing; name one of GET /v1/models", param="model")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest("stream must be true or false", param="stream")
    salt = body.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and _SALT.fullmatch(salt)):
        raise InvalidRequest("cache_salt must be 1 to 32 characters of A-Z a-z 0-9 _ -", param="cache_salt")
    for check in route.checks:
        check(body)
    kept = {name: value for name, value in body.items() if name in route.fields and value is not None}
    return {**kept, **route.fixed}


def cache_salt(tenant: str, given: str | None) -> str:
    """The prefix-cache salt of a tenant, so that no other tenant gets hits on its prompts."""
    return hashlib.sha256(f"{tenant}/{given or ''}".encode()).hexdigest()[:32]


def serialize(body: Mapping[str, Any]) -> bytes:
    """Encode JSON for the engine. Refuses what JSON cannot represent (1e999, half a surrogate pair)."""
    try:
        return _ENCODER.encode(body).encode()
    except (ValueError, UnicodeEncodeError):
        raise InvalidRequest("the body holds a number or a character that JSON cannot represent") from None


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


_NOT_STRUCTURE: Final = bytes(set(range(256)) - set(b'{[,:"'))
_DECODER: Final = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
