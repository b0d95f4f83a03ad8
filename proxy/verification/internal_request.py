"""Requests that the gateway makes by itself: under a revision or under none, and no answer without proof."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final

from interpretops.engine_api import NONCE_HEADER, NONCE_KEY, RECEIPT_HEADER, REVISION_KEY, EngineCode, Receipt
from interpretops.errors import EngineError
from proxy.engines.http_connection import refusal_code
from proxy.engines.link import ProvenEngine
from proxy.openai_api.request_body import serialize
from proxy.openai_api.request_size import size_of
from proxy.openai_api.routes import Route
from proxy.verification.receipt_proof import fault, told_by

_MOST_BYTES: Final = 4 * 1024 * 1024
"""Longest answer that is read; a longer one is given up."""


async def ask(
    engine: ProvenEngine, route: Route, body: Mapping[str, Any], revision: str, timeout_s: float
) -> tuple[bytes, Receipt]:
    """The whole answer to ``body`` under ``revision`` (64 hex, or `none`), and the receipt that proves it.

    Raises `EngineError` when it is not proven, and as `EngineHttp.post`.
    """
    nonce = secrets.token_hex(16)
    sealed = {REVISION_KEY: revision, NONCE_KEY: nonce}
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
    if refusal_code(upstream) is EngineCode.NOT_RESIDENT:
        engine.miss(revision)
    if upstream.status != 200:
        raise EngineError(f"the engine answered with status {upstream.status}")
    came = upstream.header(RECEIPT_HEADER)
    receipt = Receipt.read(came) if came else await engine.client.receipt(nonce)
    try:
        why = fault(receipt, revision, size_of(body, 0), await told_by(answer))
    except ValueError:
        raise EngineError("the engine did not answer with a JSON object") from None
    if receipt is None or why is not None:
        raise EngineError(f"the engine answered without proof: {why}")
    return answer, receipt
