"""Likelihoods of given answers, through the real op: what a gate at the prompt's end does shows in them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from discovery.evaluation.measures.likelihoods import Item, forced_items, score_items
from discovery.evaluation.suites.suite import Prompt
from discovery.evaluation.suites.suite_files import load_suite
from discovery.frozen_model import FrozenModel
from interpretops.compile import compile_policy
from interpretops.plan import ALWAYS, Plan
from interpretops.policy import load_policy
from interpretops.steering.hooked_model import HookedModel

ITEMS = (
    Item(Prompt("b/0", "benign", "b", "Say the number 3 in words."), ("It is three.",)),
    Item(
        Prompt("f/0", "factual", "f", "The sky is", chat=False, options=("blue", "green")), ("blue", "green")
    ),
    Item(
        Prompt("t/0", "text", "t", "A cat sat on the mat, and a dog ran by."),
        ("A cat sat on the mat, and a dog ran by.",),
    ),
    Item(Prompt("p/0", "bias", "p", "A cat sat."), ("A cat sat.", "A dog sat.")),
)


@pytest.fixture
def plan(tmp_path: Path, tiny: FrozenModel) -> Plan:
    """A vector added behind a gate that opens at the end of every prompt."""
    chance = np.random.default_rng(3)
    vectors = {name: chance.normal(size=32).astype(np.float32) for name in ("v", "probe")}
    save_file(vectors, tmp_path / "v.safetensors")
    probe = {"probe": {"file": "v.safetensors", "tensor": "probe"}, "threshold": -1e6}
    policy = {
        "meta": {"id": "guard"},
        "gates": {"read": {"layer": 0, "scope": "prompt_end", "latched": True, "conditions": [probe]}},
        "interventions": [
            {
                "type": "steering_vector",
                "selector": {"layer": 1},
                "vector": {"file": "v.safetensors", "tensor": "v"},
                "strength": 20.0,
                "gate": "read",
            }
        ],
    }
    path = tmp_path / "guard.yaml"
    path.write_text(yaml.safe_dump(policy))
    return compile_policy(load_policy(path), model=tiny.spec, artifacts=tmp_path)


def test_gate_at_the_prompts_end_shows_on_answers(plan: Plan, tiny_folder: Path, tmp_path: Path) -> None:
    """Unsteered scores are the model's own, steered ones differ; a second sitting scores what is missing."""
    out = tmp_path / "scores.jsonl"
    found = score_items(ITEMS, plan, tiny_folder, "float32", out).found
    model = HookedModel(tiny_folder, dtype="float32")
    prompt = model.tokens("Say the number 3 in words.", chat=True)
    answer = list(model.tokenizer("It is three.", add_special_tokens=False).input_ids)
    logs = model.logprobs(prompt + answer)
    right = sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))
    assert found["off", "b/0"] == [(pytest.approx(right, abs=1e-3), len(answer))]
    for item in ITEMS:
        assert len(found["on", item.prompt.id]) == len(item.answers)
        pairs = zip(found["off", item.prompt.id], found["on", item.prompt.id], strict=True)
        assert all(abs(off[0] - on[0]) > 1e-3 for off, on in pairs), item.prompt.id
    lines = out.read_text()
    torn = out.read_text().rstrip("\n")[:-5]
    out.write_text(torn)
    again = score_items(ITEMS, plan, tiny_folder, "float32", out).found
    assert {key: [(pytest.approx(a, abs=1e-3), n) for a, n in rows] for key, rows in found.items()} == again
    assert len(out.read_text().splitlines()) == len(lines.splitlines())
    out.write_text(lines)
    score_items(ITEMS, plan, Path("/nowhere"), "float32", out)


def test_plain_text_is_its_own_prompt(plan: Plan, tiny_folder: Path, tmp_path: Path) -> None:
    """Its second half is scored behind the first, so that a gate has decided."""
    text = "A cat sat on the mat, and a dog ran by."
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "suite.yaml").write_text(
        yaml.safe_dump(
            {"name": "s", "sources": [{"path": "text.txt", "role": "text", "licence": "own", "limit": 1}]}
        )
    )
    loaded = load_suite(tmp_path / "suite.yaml")
    (item,) = forced_items(loaded, {}, 3, plan)
    assert forced_items(loaded, {}, 3, replace(plan, gates=(ALWAYS, ALWAYS))) == []
    found = score_items([item], plan, tiny_folder, "float32", tmp_path / "text.jsonl").found
    tokens = HookedModel(tiny_folder, dtype="float32").tokenizer(item.prompt.text).input_ids
    ((off, count),), ((on, _),) = found["off", item.prompt.id], found["on", item.prompt.id]
    assert count == len(tokens) - len(tokens) // 2
    assert abs(off - on) > 1e-3
