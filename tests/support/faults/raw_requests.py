"""Malformed and ambiguous HTTP requests, and a thousand variations of them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

from interpretops.engine_api import REVISION_KEY

CANARY = "canary-5f2c9d"
BODY = b'{"model": "tiny-model", "messages": []}'
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CHUNKED = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
AMBIGUOUS = {
    "length and chunks": POST + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED,
    "two lengths": POST + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY,
    "length with a sign": POST + b"Content-Length: +39\r\n\r\n" + BODY,
    "length of letters": POST + b"Content-Length: 0x27\r\n\r\n" + BODY,
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKED,
    "chunked is not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n" + CHUNKED,
    "space before the colon": POST + b"Transfer-Encoding : chunked\r\n" + LENGTH + b"\r\n" + BODY,
    "folded header": POST + b"X-A: b\r\n c\r\n" + LENGTH + b"\r\n" + BODY,
    "NUL in a header": POST + b"X-A: b\x00c\r\n" + LENGTH + b"\r\n" + BODY,
    "header without a name": POST + b": b\r\n" + LENGTH + b"\r\n" + BODY,
    "bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + BODY,
    "chunk that is too short": POST + b"Transfer-Encoding: chunked\r\n\r\n5\r\n" + BODY + b"\r\n0\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no version": POST.replace(b" HTTP/1.1", b"") + LENGTH + b"\r\n" + BODY,
    "unknown version": b"GET /v1/models HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "a key in a broken header": POST + b"Authorization: Bearer " + CANARY.encode() + b"\x01\r\n\r\n",
    "a key in a broken line": b"POST /v1/" + CANARY.encode() + b" \x01 HTTP/1.1\r\n\r\n",
    "300 headers": POST + b"".join(b"X-%d: a\r\n" % n for n in range(300)) + b"\r\n",
    "endless header": POST + b"X-A: " + b"a" * 70_000 + b"\r\n\r\n",
}

_BODIES = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe{}",
    b'{"model": 1}',
    b'{"model": "tiny-model", "model": "tiny-model+none", "messages": []}',
    b'{"model": "tiny-model", "messages": "hi"}',
    b'{"model": "tiny-model", "messages": [], "temperature": NaN}',
    b'{"model": "tiny-model", "messages": [], "max_tokens": 1e999}',
    b'{"model": "tiny-model", "messages": [], "seed": ' + b"9" * 5000 + b"}",
    b'{"model": "tiny-model", "messages": [], "stream": "yes"}',
    b'{"model": "tiny-model", "messages": [], "vllm_xargs": {"%b": "none"}}' % REVISION_KEY.encode(),
    b'{"model": "tiny-model", "messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"model": "tiny-model", "messages": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"model": "tiny-model", "messages": [' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"]}",
]
_HEADS = [
    b"POST /v1/chat/completions HTTP/1.1\r\n",
    b"POST /v1/completions HTTP/1.0\r\n",
    b"POST /v1/messages HTTP/1.1\r\n",
    b"POST http://127.0.0.1:1/v1/responses HTTP/1.1\r\n",
    b"POST /v1/chat/completions?a=%00%ff HTTP/1.1\r\n",
    b"POST /v1/../metrics HTTP/1.1\r\n",
    b"POST /%2e%2e/admin/reload HTTP/1.1\r\n",
    b"DELETE /v1/responses/" + b"a" * 4000 + b" HTTP/1.1\r\n",
    b"GET /v1/models/" + b"%f0%9f%92%a9" * 40 + b" HTTP/1.1\r\n",
    b"CONNECT 127.0.0.1:80 HTTP/1.1\r\n",
    b"OPTIONS * HTTP/1.1\r\n",
    b"TRACE / HTTP/1.1\r\n",
    b"\x00\x01\x02 / HTTP/1.1\r\n",
]


def malformed(count: int, model: str, seed: int = 0) -> Iterator[bytes]:
    """``count`` requests: ambiguous ones, wrong bodies on all routes, and randomly damaged valid ones."""
    pick = random.Random(seed)
    right = json.dumps({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1})
    whole = POST + b"Content-Length: %d\r\n\r\n" % len(right) + right.encode()
    for index in range(count):
        kind = index % 3
        if kind == 0:
            yield list(AMBIGUOUS.values())[index // 3 % len(AMBIGUOUS)] + whole
        elif kind == 1:
            body, head = pick.choice(_BODIES), pick.choice(_HEADS)
            length = b"Content-Length: %d\r\n\r\n" % len(body)
            yield head + b"Host: localhost\r\nContent-Type: application/json\r\n" + length + body
        else:
            yield _damage(whole, pick)


def _damage(data: bytes, pick: random.Random) -> bytes:
    """A copy with some bytes changed, removed or doubled, or the end missing."""
    damaged = bytearray(data)
    for _ in range(pick.choice((1, 2, 8))):
        at = pick.randrange(len(damaged))
        match pick.randrange(4):
            case 0:
                damaged[at] = pick.randrange(256)
            case 1:
                del damaged[at : at + pick.randrange(1, 9)]
            case 2:
                damaged[at:at] = damaged[at : at + pick.randrange(1, 40)]
            case 3:
                damaged[at:at] = pick.choice((b"\r\n", b"\x00", b"\n", b"0\r\n\r\n", b": ", b"\xff"))
    return bytes(damaged[: pick.randrange(1, len(damaged))] if pick.random() < 0.1 else damaged)
