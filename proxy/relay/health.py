"""The liveness and readiness routes, `/healthz` and `/readyz`."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from proxy.state import GATEWAY

HEALTH: Final = frozenset(("/healthz", "/readyz"))
"""Routes that need no key. They return only a status and the codes of what is wrong."""


def add_health(app: web.Application) -> None:
    """Add the liveness and readiness routes to an app."""
    app.router.add_get("/healthz", healthz, allow_head=False)
    app.router.add_get("/readyz", readyz, allow_head=False)


async def healthz(_request: web.Request) -> web.Response:
    """Always 200 while the process runs."""
    return web.json_response({"status": "ok"})


async def readyz(request: web.Request) -> web.Response:
    """Whether requests can be served, and if not, the reason codes."""
    reasons = sorted({reason.code for reason in request.app[GATEWAY].readiness.reasons()})
    return web.json_response({"ready": not reasons, "reasons": reasons}, status=503 if reasons else 200)
