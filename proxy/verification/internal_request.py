"""Requests that the gateway itself sends, with or without a revision. Returns only proven answers."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Final

from interpretops.engine_api import NONCE_HEADER, RECEIPT_HEADER, EngineCode, Receipt, seal
from interpretops.errors import EngineError
from proxy.engines.http_connection import refusal_code
from proxy.engines.link import ProvenEngine
from proxy.openai_api.request_body import serialize
from proxy.openai_api.request_size import size_of
from proxy.openai_api.routes import Route
from proxy.verification.receipt_proof import answer_usage, receipt_fault

_MAX_BYTES: Final = 4 * 1024 * 1024
"""Longest answer that is read; longer ones raise."""


async def ask(
    engine: ProvenEngine, route: Route, body: Mapping[str, Any], revision: str, timeout_s: float
) -> tuple[bytes, Receipt]:
    """Send ``body`` under ``revision`` (64 hex, or `none`). Returns the whole answer and its receipt.

    Raises `EngineError` if the receipt does not prove the answer, and as `EngineHttp.post`.
    """
    nonce = secrets.token_hex(16)
    upstream = await engine.client.generate(
        route.path,
        serialize({**body, "vllm_xargs": seal(revision, nonce)}),
        total_timeout_s=timeout_s,
        idle_timeout_s=None,
        headers={NONCE_HEADER: nonce},
    )
    try:
        answer = await upstream.read(_MAX_BYTES)
    finally:
        upstream.close()
    if refusal_code(upstream) is EngineCode.NOT_RESIDENT:
        engine.mark_missing(revision)
    if upstream.status != 200:
        raise EngineError(f"the engine answered with status {upstream.status}")
    receipt_header = upstream.header(RECEIPT_HEADER)
    receipt = Receipt.read(receipt_header) if receipt_header else await engine.client.receipt(nonce)
    try:
        why = receipt_fault(receipt, revision, size_of(body, 0), await answer_usage(answer))
    except ValueError:
        raise EngineError("the engine's response is not a JSON object") from None
    if receipt is None or why is not None:
        raise EngineError(f"the engine's answer is not proven: {why}")
    return answer, receipt
