"""Our OpenAPI document matches what is served, and no input allowed by it or the engine's causes a 5xx."""

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from engines import EngineServer
from fake_engine import FakeEngine
from faults.stand import make_stand
from running_gateway import Start

from proxy.openai_api.openapi import openapi_document
from proxy.openai_api.request_body import clean
from proxy.openai_api.routes import ROUTES, UNGUARDED
from proxy.relay.public_app import make_public_app

CLIENTS = Path(__file__).parents[2] / "clients"
PYTHON = CLIENTS / ".venv/bin/python"
CHECKS = "not_a_server_error"
STRICT = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.fixture
def fuzz() -> Callable[..., Awaitable[Any]]:
    """Run schemathesis with a document against a URL; skipped if it is not installed."""
    if not (CLIENTS / ".venv/stamp").exists() and "CI" not in os.environ:
        pytest.skip("schemathesis: tests/clients/install.sh has not run, or failed")

    async def run(document: Path, url: str, *flags: str) -> tuple[int, str]:
        command = [str(PYTHON), "-m", "schemathesis.cli", "run", str(document), "--url", url, *flags]
        command += ["--seed", "1", "--generation-database", "none", "--suppress-health-check", "all"]
        command += ["--no-color", "--continue-on-failure", "--no-shrink", "--output-truncate", "true"]
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=document.parent,
            env={**os.environ, "PYTHONPATH": str(CLIENTS), "SCHEMATHESIS_HOOKS": "short_answers"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        got, _ = await asyncio.wait_for(process.communicate(), 800)
        return process.returncode or 0, got.decode()

    return run


async def test_document_names_what_is_served_and_nothing_else(start: Start) -> None:
    """Every route of the app is in the served document, and every documented route is in the app."""
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
def test_every_field_of_the_document_passes(path: str) -> None:
    """No documented field is refused as not allowed."""
    got = openapi_document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = dict.fromkeys(got["properties"]) | {"model": "m", "input": "hi"}
    route = ROUTES[path]
    clean(route, {name: value for name, value in body.items() if name in got["properties"]})


async def test_our_document_describes_every_response(
    start: Start, engine: FakeEngine, fuzz: Callable[..., Awaitable[Any]], tmp_path: Path
) -> None:
    """Any input, valid or not, gets a documented response in its documented format, and never a 5xx."""
    front = await start("calm", bindings=[{"policy": "calm", "mode": "mandatory"}])
    file = tmp_path / "ours.json"
    document = openapi_document()
    for got in (document["paths"][path]["post"] for path in ROUTES):
        # Otherwise each request would name another model and be refused for that alone.
        fields = got["requestBody"]["content"]["application/json"]["schema"]["properties"]
        fields["model"] = {"enum": ["tiny-model", "tiny-model+calm", "tiny-model+none"]}
    file.write_text(json.dumps(document))
    status, got = await fuzz(
        file, str(front.public._base_url), "--checks", STRICT, "--max-examples", "20", "--workers", "2"
    )
    assert status == 0, got[-6000:]
    assert engine.seen


@pytest.mark.engine
@pytest.mark.timeout(900)
async def test_engines_document_makes_no_5xx(
    engine_server: EngineServer, default_model_dir: Path, fuzz: Callable[..., Awaitable[Any]], tmp_path: Path
) -> None:
    """Input allowed or forbidden by the engine's own document, sent to the gateway with a real engine."""
    with engine_server.client() as client:
        document = client.get("/openapi.json").json()
    document["paths"] = {path: got for path, got in document["paths"].items() if path in ROUTES}
    assert document["paths"].keys() == ROUTES.keys()
    file = tmp_path / "engine.json"
    file.write_text(json.dumps(document))
    engine = {"engine_socket": str(engine_server.socket), "engine_pid": engine_server.process.pid}
    (tmp_path / "stand").mkdir()
    async with make_stand(tmp_path / "stand", default_model_dir, **engine) as stand:
        status, got = await fuzz(
            file, stand.url, "--checks", CHECKS, "--max-examples", "20", "--phases", "fuzzing"
        )
        assert status == 0, got[-6000:]
        assert await stand.ready()
