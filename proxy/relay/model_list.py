"""The model list: the engine's models, and an alias for each policy that the caller may choose."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from proxy.errors import (
    UnknownModel,
)
from proxy.policies.binding import Caller, choices
from proxy.state import GATEWAY, IDENTITY


async def list_models(request: web.Request) -> web.Response:
    """The engine's models, and an alias for each policy that this caller may choose."""
    return web.json_response({"object": "list", "data": listed_models(request)})


async def show_model(request: web.Request) -> web.Response:
    """One entry of the model list."""
    name = request.match_info["model"]
    for model in listed_models(request):
        if model["id"] == name:
            return web.json_response(model)
    raise UnknownModel(f"model {name[:128]!r} is not served here; see GET /v1/models", param="model")


def listed_models(request: web.Request) -> list[dict[str, Any]]:
    gateway, identity = request.app[GATEWAY], request[IDENTITY]
    by_name = {model["id"]: model for model in gateway.fleet.require().models}
    names = [*by_name, *(alias.name for alias in gateway.settings.aliases if alias.name not in by_name)]
    listed: list[dict[str, Any]] = []
    for name in filter(identity.may_name, names):
        try:
            model = by_name[gateway.engine_model(name)]
        except UnknownModel:
            # The alias names a model that the engine does not serve; logged when the engine joined.
            continue
        base = {
            "object": "model",
            "created": model.get("created", 0),
            "owned_by": "interpretops",
            "max_model_len": model.get("max_model_len"),
        }
        listed.append({"id": name, **base})
        caller = Caller("/v1/chat/completions", name, None, identity.tenant.id, identity.key)
        for policy in choices(gateway.settings.bindings, caller, gateway.catalogue.entries):
            listed.append({"id": f"{name}+{policy}", **base, "parent": name})
    return listed
