"""Names in the protocol between gateway and engine: routes, headers, and the seal of a request."""

from __future__ import annotations

from typing import Final

PREFIX: Final = "/interpretops/v1"
"""Prefix of the plugin's own routes."""
ATTEST_ROUTE: Final = f"{PREFIX}/attest"
SELF_TEST_ROUTE: Final = f"{PREFIX}/selftest"
PLAN_ROUTE: Final = f"{PREFIX}/plans/{{revision}}"
"""PUT loads a plan, DELETE retires it. The pattern works in both aiohttp and FastAPI."""
RECEIPT_ROUTE: Final = f"{PREFIX}/receipts/{{nonce}}"

HOLDER_HEADER: Final = "x-interpretops-holder"
"""Identifies the gateway: an engine keeps a plan as long as a live gateway holds it."""
NONCE_HEADER: Final = "x-interpretops-nonce"
"""Asks the engine to send the request's receipt with the answer."""
RECEIPT_HEADER: Final = "x-interpretops-receipt"
"""The receipt of a non-streamed answer."""
RECEIPT_COMMENT: Final = b": interpretops-receipt "
"""Begins the event-stream line with the receipt, the last line before the end marker."""
REFUSAL_HEADER: Final = "x-interpretops-refusal"
"""The `EngineCode` of a request that the plugin refused, also in the body's `error.code`."""
INTERNAL_HEADERS: Final = "x-interpretops-"
"""Prefix of the protocol's headers; clients may not send them and never receive them."""

REVISION_KEY: Final = "interpretops_revision"
"""In `vllm_xargs`: 64 hex, or `PASS_THROUGH`."""
NONCE_KEY: Final = "interpretops_nonce"
"""In `vllm_xargs`: names the receipt."""
PASS_THROUGH: Final = "none"  # noqa: S105 (no password)
"""The revision of a request without a policy."""


def seal(revision: str, nonce: str) -> dict[str, str]:
    """The `vllm_xargs` of a request: which revision it demands, and the name of its receipt."""
    return {REVISION_KEY: revision, NONCE_KEY: nonce}


def plan_path(revision: str) -> str:
    """The route of one plan; ``revision`` is 64 hex digits."""
    return PLAN_ROUTE.format(revision=revision)


def receipt_path(nonce: str) -> str:
    """The route of one receipt; ``nonce`` is hex digits."""
    return RECEIPT_ROUTE.format(nonce=nonce)


def receipt_event(receipt: str) -> bytes:
    """The event that carries a receipt at the end of a stream."""
    return RECEIPT_COMMENT + receipt.encode() + b"\n\n"
