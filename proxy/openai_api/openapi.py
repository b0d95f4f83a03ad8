"""The OpenAPI document of the public listener, generated from the route table and the error classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from interpretops import __version__
from proxy.errors import Refusal, error_body
from proxy.openai_api.headers import POLICY_HEADER, RECEIPT_HEADER, REQUEST_ID_HEADER
from proxy.openai_api.request_body import SALT_PATTERN
from proxy.openai_api.routes import DROPPED, ROUTES, UNGUARDED, Route

_TYPED: Final[Mapping[str, Any]] = {
    "model": {"type": "string"},
    "stream": {"type": ["boolean", "null"]},
    "cache_salt": {"type": ["string", "null"], "pattern": f"^{SALT_PATTERN}$"},
}
"""Fields that the gateway checks itself. The engine checks all others."""
_GET_ROUTES: Final = ("/healthz", "/readyz", "/openapi.json", "/v1/models", "/v1/models/{model}")


def openapi_document() -> dict[str, Any]:
    """OpenAPI 3.1: all routes that are served or refused by name, their fields, and all error codes."""
    errors = {str(status): {"$ref": f"#/components/responses/{status}"} for status in _codes()}
    paths: dict[str, Any] = {path: {"get": _read(path, errors)} for path in _GET_ROUTES}
    paths |= {path: {"post": _operation(route, errors)} for path, route in ROUTES.items()}
    for path, why in UNGUARDED.items():
        refused = {status: errors[status] for status in ("401", "403")}
        operation = {"summary": f"Refused: {why}", "responses": refused}
        paths[path] = {"post": {**operation, "parameters": list(_in_path(path))}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "InterpretOps gateway", "version": __version__},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error_schema()},
            "responses": {str(status): _error(codes) for status, codes in sorted(_codes().items())},
        },
    }


def _operation(route: Route, errors: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: _TYPED.get(name, {}) for name in sorted(route.fields.keys() | DROPPED)}
    body = {"type": "object", "properties": known, "required": ["model"], "additionalProperties": False}
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    headers = [REQUEST_ID_HEADER]
    parameters = [{"name": REQUEST_ID_HEADER, "in": "header", "schema": {"type": "string"}}]
    if route.generates:
        content["text/event-stream"] = {"schema": {"type": "string"}}
        headers += [POLICY_HEADER, RECEIPT_HEADER]
        parameters.append({"name": POLICY_HEADER, "in": "header", "schema": {"type": "string"}})
    sent = {name: {"schema": {"type": "string"}} for name in headers}
    return {
        "parameters": parameters,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": {"description": "The answer.", "headers": sent, "content": content}, **errors},
    }


def _read(path: str, errors: Mapping[str, Any]) -> dict[str, Any]:
    answer = {"description": "The answer.", "content": {"application/json": {"schema": {"type": "object"}}}}
    responses = {"200": answer, **errors} | ({"503": answer} if path == "/readyz" else {})
    return {"parameters": list(_in_path(path)), "responses": responses}


def _in_path(path: str) -> Iterator[dict[str, Any]]:
    for part in path.split("/"):
        if part.startswith("{"):
            yield {"name": part.strip("{}"), "in": "path", "required": True, "schema": {"type": "string"}}


def _error(codes: list[str]) -> dict[str, Any]:
    code = {"properties": {"error": {"properties": {"code": {"enum": codes}}}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Error"}, code]}
    return {"description": ", ".join(codes), "content": {"application/json": {"schema": schema}}}


def _error_schema() -> dict[str, Any]:
    fields = error_body(400, "", "")["error"]
    types = {"param": ["string", "null"]}
    inner = {name: {"type": types.get(name, "string")} for name in fields}
    error = {"type": "object", "properties": inner, "required": list(fields), "additionalProperties": False}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}


def _codes() -> dict[int, list[str]]:
    """All error codes, by HTTP status."""
    found: dict[int, set[str]] = {}
    kinds = list(Refusal.__subclasses__())
    for kind in kinds:
        kinds += kind.__subclasses__()
        found.setdefault(kind.status, set()).add(kind.code)
    return {status: sorted(codes) for status, codes in found.items()}
