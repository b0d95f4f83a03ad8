"""Which plans edit a prompt as they would edit the same text if it were generated."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engines import vector_plan

from interpretops.plan import (
    ALWAYS,
    Gate,
    HeadScaling,
    ModelSpec,
    Plan,
    ProbePart,
    Site,
    SiteEdits,
    empty_units,
)
from interpretops.plan.compose import compose_plans
from interpretops.plan.reach import steers_prompt_alike

SPEC = ModelSpec("m", "f" * 64, "LlamaForCausalLM", 8, 8, 2, 2, 4, 32)
READ: dict[str, Any] = {
    "read": np.ones((1, 8), np.float32),
    "bias": np.zeros(1, np.float32),
    "cut": np.zeros(1, np.float32),
}
EMPTY: dict[str, Any] = {
    "read": np.zeros((0, 8), np.float32),
    "bias": np.zeros(0, np.float32),
    "cut": np.zeros(1, np.float32),
}
HERE = Site(1, "resid_post")
PROBE = ProbePart(HERE, np.ones((1, 8), np.float32), np.ones((1, 8), np.float32), np.zeros(1, np.float32))
ALIKE = {
    "none": None,
    "token": Gate(HERE, **READ),
    "token, latched": Gate(HERE, **READ, latched=True),
}
NOT_ALIKE = {
    "prompt_end": Gate(HERE, **READ, scope="prompt_end"),
    "prompt": Gate(HERE, **EMPTY, scope="prompt", probe=(PROBE,)),
    "prompt, latched": Gate(HERE, **EMPTY, scope="prompt", probe=(PROBE,), latched=True),
    "decode": replace(ALWAYS, phase="decode"),
    "prefill": replace(ALWAYS, phase="prefill"),
    "token in decode": Gate(HERE, **READ, phase="decode"),
}


def plan(gate: Gate | None, layer: int = 2, name: str = "p") -> Plan:
    return replace(vector_plan(SPEC, 1.0, layer=layer, gate=gate), policy_id=name)


@pytest.mark.parametrize("name", [*ALIKE, *NOT_ALIKE])
def test_plan_is_alike_only_if_every_gate_decides_at_every_token(name: str) -> None:
    """A gate that waits for the end of the prompt, or knows phases, leaves the prompt before it unedited."""
    gate = (ALIKE | NOT_ALIKE)[name]
    assert steers_prompt_alike(plan(gate)) == (name in ALIKE)


@pytest.mark.parametrize("name", NOT_ALIKE)
def test_composed_plan_is_alike_only_if_all_parts_are(name: str) -> None:
    """One part that waits is enough."""
    always = plan(None, layer=3, name="a")
    assert not steers_prompt_alike(compose_plans([always, plan(NOT_ALIKE[name], name="b")]))
    assert steers_prompt_alike(compose_plans([always, plan(ALIKE["token"], name="b")]))


def test_head_scales_gate_counts_too() -> None:
    """Edits of heads have gates of their own."""
    scale = HeadScaling(np.ones((1, 8), np.float32), np.ones(1, np.int32))
    edits = {Site(2, "attn_z"): SiteEdits(empty_units(8), scale)}
    waits = replace(plan(NOT_ALIKE["prompt_end"]), edits=edits)
    assert not steers_prompt_alike(waits)


def test_gate_that_no_edit_uses_does_not_count() -> None:
    """What decides nothing withholds nothing."""
    assert steers_prompt_alike(replace(plan(None), gates=(ALWAYS, NOT_ALIKE["prompt_end"])))
