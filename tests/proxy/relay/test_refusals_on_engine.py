"""A refusal gate on the real engine, seen through the gateway: proven, shown, counted and recorded."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import EngineServer
from running_gateway import Front, Start
from safetensors.numpy import save_file

pytestmark = [pytest.mark.engine, pytest.mark.slow]

POLICY = """
meta: {id: declines}
gates:
  end:
    layer: 2
    conditions: [{probe: {file: ones.safetensors, tensor: ones}, bias: BIAS}]
    scope: prompt_end
    latched: true
    refusal: true
interventions:
  - {type: head_scale, selector: {layer: 8, heads: [0]}, scale: 0.5, gate: end}
"""
TEXT = "I'm sorry, but I can't help with that."
ASKED = [{"role": "user", "content": "Say hello."}]
AS_JSON = {"response_format": {"type": "json_object"}, "max_tokens": 30, "temperature": 1}


async def begin(start: Start, engine: EngineServer, folder: Path, *, opens: bool) -> Front:
    """A gateway under a mandatory policy whose gate opens at the end of every prompt, or of none."""
    folder.mkdir()
    (folder / "declines.yaml").write_text(POLICY.replace("BIAS", "1.0e+6" if opens else "-1.0e+6"))
    save_file({"ones": np.ones(576, np.float32)}, folder / "ones.safetensors")
    front = await start(
        wait=False,
        bindings=[{"policy": "declines", "mode": "mandatory"}],
        **{"engine.url": engine.url, "audit.path": folder.parent / "audit.jsonl"},
    )
    await asyncio.wait_for(front.apps.engine_loop.first_ready.wait(), 120)
    return front


async def post(front: Front, route: str, **body: Any) -> tuple[Any, str]:
    async with front.public.post(f"/v1/{route}", json={"model": "m", "temperature": 0, **body}) as answer:
        text = await answer.text()
        assert answer.status == 200, text
        return answer.headers, text


async def test_stopped_answers_are_proven_shown_and_counted(
    start: Start, engine_server: EngineServer, tmp_path: Path
) -> None:
    """Whole and streamed answers of two choices pass the receipt's check with the refusal in them, and are
    counted by choice in metric and audit log; an unconstrained one is counted and keeps its words."""
    front = await begin(start, engine_server, tmp_path / "policies", opens=True)
    headers, whole = await post(front, "chat/completions", messages=ASKED, n=2, **AS_JSON)
    assert [choice["message"].get("refusal") for choice in json.loads(whole)["choices"]] == [TEXT, TEXT]
    assert json.loads(headers["X-Steering-Receipt"])["refusals"] == 2
    _, stream = await post(front, "chat/completions", messages=ASKED, n=2, stream=True, **AS_JSON)
    assert stream.count(json.dumps({"refusal": TEXT})) == 2
    assert '"refusals":2' in stream
    assert stream.endswith("data: [DONE]\n\n")
    _, plain = await post(front, "chat/completions", messages=ASKED, max_tokens=8)
    assert json.loads(plain)["choices"][0]["message"]["content"]
    shown = front.apps.gateway.metrics.render().decode()
    assert 'interpretops_policy_refusals_total{policy="declines"} 5.0' in shown
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_bytes().splitlines()]
    counted = [(r["refusals"], r["reason"]) for r in records if r["event"] == "request"]
    assert counted == [(2, None), (2, None), (1, None)]


async def test_closed_refusal_gate_refuses_nothing(
    start: Start, engine_server: EngineServer, tmp_path: Path
) -> None:
    """The same policy with a gate that stays closed: the constrained answer is the model's own."""
    front = await begin(start, engine_server, tmp_path / "policies", opens=False)
    headers, whole = await post(front, "chat/completions", messages=ASKED, **AS_JSON)
    message = json.loads(whole)["choices"][0]["message"]
    assert (message["content"] != "", message["refusal"]) == (True, None)
    assert json.loads(headers["X-Steering-Receipt"])["refusals"] == 0
