"""Our OpenAPI document is what is served."""

import pytest

from proxy.app import make_public_app
from proxy.openapi import openapi_document
from proxy.routes import ROUTES, UNGUARDED
from proxy.sanitize import clean


async def test_document_names_what_is_served_and_nothing_else(start):
    """Each route of the app stands in the document served by it, and each of the document's in the app."""
    front = await start()
    async with front.public.get("/openapi.json") as answer:
        document = await answer.json()
    assert document == openapi_document()
    app = make_public_app(front.apps.gateway)
    served = {resource.canonical for resource in app.router.resources()}
    assert set(document["paths"]) == served
    for path in UNGUARDED:
        assert set(document["paths"][path]["post"]["responses"]) == {"401", "403"}


@pytest.mark.parametrize("path", ROUTES)
def test_every_field_of_the_document_passes(path):
    """A field that the document names is never refused as one that may not be set."""
    told = openapi_document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = dict.fromkeys(told["properties"]) | {"model": "m", "input": "hi"}
    route = ROUTES[path]
    clean(route, {name: value for name, value in body.items() if name in told["properties"]})
