"""Requests that the gateway makes by itself: under a revision or under none, and no answer without proof."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final

from interpretops.errors import EngineError
from proxy.engine_client import NONCE_HEADER, RECEIPT_HEADER, Receipt
from proxy.engine_link import ProvenEngine
from proxy.proof import fault, told_by
from proxy.request_size import size_of
from proxy.routes import Route
from proxy.sanitize import serialize

_MOST_BYTES: Final = 4 * 1024 * 1024
"""Longest answer that is read; a longer one is given up."""


async def ask(
    engine: ProvenEngine, route: Route, body: Mapping[str, Any], revision: str, timeout_s: float
) -> tuple[bytes, Receipt]:
    """The whole answer to ``body`` under ``revision`` (64 hex, or `none`), and the receipt that proves it.

    Raises `EngineError` when it is not proven, and as `EngineHttp.post`.
    """
    nonce = secrets.token_hex(16)
    sealed = {"interpretops_revision": revision, "interpretops_nonce": nonce}
    upstream = await engine.client.generate(
        route.path,
        serialize({**body, "vllm_xargs": sealed}),
        total_timeout_s=timeout_s,
        idle_timeout_s=None,
        headers={NONCE_HEADER: nonce},
    )
    try:
        answer = await upstream.read(_MOST_BYTES)
    finally:
        upstream.close()
    if upstream.status != 200:
        raise EngineError(f"the engine answered with status {upstream.status}")
    came = upstream.headers.get(RECEIPT_HEADER)
    receipt = await engine.client.receipt(nonce) if came is None else Receipt.read(came)
    try:
        why = fault(receipt, revision, size_of(body, 0), await told_by(answer))
    except ValueError:
        raise EngineError("the engine did not answer with a JSON object") from None
    if receipt is None or why is not None:
        raise EngineError(f"the engine answered without proof: {why}")
    return answer, receipt
