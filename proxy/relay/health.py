"""The two routes by which an orchestrator watches the gateway: alive, and ready."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from proxy.state import GATEWAY

HEALTH: Final = frozenset(("/healthz", "/readyz"))
"""Routes that an orchestrator asks without a key; they say yes or no, and of a no its codes."""


def add_health(app: web.Application) -> None:
    """The routes by which an orchestrator watches the gateway."""
    app.router.add_get("/healthz", healthz, allow_head=False)
    app.router.add_get("/readyz", readyz, allow_head=False)


async def healthz(_request: web.Request) -> web.Response:
    """The gateway's process answers."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Whether requests can be served, and the codes of what is in the way."""
    reasons = sorted({reason.code for reason in request.app[GATEWAY].readiness.reasons()})
    return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)
