"""Composing plans: what each does alone they do together, or it is refused."""

from pathlib import Path

import pytest

from interpretops.compile import compile_policy
from interpretops.errors import PlanError
from interpretops.plan import ModelSpec, Plan, read_plan
from interpretops.plan.compose import compose_plans
from interpretops.policy import load_policy

SPEC = ModelSpec("tiny", "f" * 64, "LlamaForCausalLM", 8, 4, 2, 2, 4, 32)
EDIT = "  - {{type: head_scale, selector: {{layer: {layer}, heads: [{head}]}}, scale: 0.5{gate}}}\n"
GATE = ", gate: g"


def plan(tmp_path: Path, name: str, *edits: tuple[int, int, str], phase: str = "decode") -> Plan:
    path = tmp_path / f"{name}.yaml"
    body = "".join(EDIT.format(layer=layer, head=head, gate=gate) for layer, head, gate in edits)
    gates = f"gates: {{g: {{phase: {phase}}}}}\n" if GATE in body else ""
    path.write_text(f"meta: {{id: {name}}}\n{gates}interventions:\n{body}")
    return compile_policy(load_policy(path), model=SPEC, artifacts=tmp_path)


def test_edits_keep_their_own_gates(tmp_path: Path) -> None:
    """Each edit stays under the gate it had, whatever place that has in the composed plan."""
    first = plan(tmp_path, "a", (0, 0, GATE), (1, 0, ""))
    second = plan(tmp_path, "b", (2, 1, GATE), (3, 0, ""), phase="prefill")
    both = compose_plans([second, first])
    assert both.policy_id == "a+b"
    assert both.provenance == {"composed": {"a": first.revision, "b": second.revision}}
    for alone in (first, second):
        for site, here in alone.edits.items():
            together = both.edits[site]
            assert here.head_scale is not None
            assert together.head_scale is not None
            assert (together.head_scale.delta == here.head_scale.delta).all()
            for mine, ours in zip(here.head_scale.gate, together.head_scale.gate, strict=True):
                assert both.gates[ours].phase == alone.gates[mine].phase
    assert {gate.phase for gate in both.gates} == {"both", "decode", "prefill"}


def test_composed_plan_is_content_addressed(tmp_path: Path) -> None:
    """The order in which plans are given changes nothing, and the file is read back as it was."""
    plans = [plan(tmp_path, name, (layer, 0, "")) for layer, name in enumerate("abc")]
    both = compose_plans(plans)
    assert compose_plans(plans[::-1]).revision == both.revision
    assert read_plan(both.to_bytes()).revision == both.revision


def test_what_has_no_one_meaning_is_refused(tmp_path: Path) -> None:
    """The same place twice and the same policy twice are refused, with both names."""
    first, same = plan(tmp_path, "a", (1, 0, "")), plan(tmp_path, "b", (1, 1, ""))
    with pytest.raises(PlanError, match=r"policies 'a' and 'b' cannot be composed: both edit 1.attn_z"):
        compose_plans([first, same])
    with pytest.raises(PlanError, match="one of them appears twice"):
        compose_plans([first, first])
