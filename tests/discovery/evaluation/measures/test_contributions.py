"""CCS of a card: each part of the policy is ablated alone, and what is lost is its share of the effect."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from discovery.evaluation.answers.answer_file import Answer
from discovery.evaluation.measures.contributions import (
    changed_items,
    contribution_measure,
    effect_of,
    score_effect,
)
from discovery.evaluation.measures.policy_parts import parts_of, without_part
from discovery.evaluation.options import MOST_PARTS
from discovery.evaluation.suites.suite import LoadedSuite, spread
from discovery.evaluation.suites.suite_files import load_suite
from discovery.frozen_model import FrozenModel
from interpretops.artifacts.adapter import AdapterSite, write_adapter
from interpretops.compile import compile_policy
from interpretops.plan import Plan, Site
from interpretops.policy import Policy, load_policy
from interpretops.riskcard.measures import causal_contribution
from interpretops.steering.hooked_model import HookedModel
from interpretops.steering.session import SteeringSession

PROMPTS = [f"Say the number {i} in words." for i in range(6)]


def policy_of(folder: Path, tiny: FrozenModel, interventions: list[dict[str, Any]]) -> tuple[Policy, Plan]:
    """A policy and its plan; `strong` and `other` are vectors for it."""
    chance = np.random.default_rng(3)
    vectors = {name: chance.normal(size=32).astype(np.float32) for name in ("strong", "other")}
    save_file(vectors, folder / "v.safetensors")
    path = folder / "guard.yaml"
    path.write_text(yaml.safe_dump({"meta": {"id": "guard"}, "interventions": interventions}))
    policy = load_policy(path)
    return policy, compile_policy(policy, model=tiny.spec, artifacts=folder)


def vector(name: str, layer: int, strength: float) -> dict[str, Any]:
    """A steering vector."""
    return {
        "type": "steering_vector",
        "selector": {"layer": layer},
        "vector": {"file": "v.safetensors", "tensor": name},
        "strength": strength,
    }


def suite_of(folder: Path) -> LoadedSuite:
    """Six harmful prompts."""
    (folder / "bad.json").write_text(json.dumps(PROMPTS))
    source = {"path": "bad.json", "role": "harmful", "licence": "own"}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "own", "sources": [source]}))
    return load_suite(folder / "suite.yaml")


def answers_of(loaded: LoadedSuite, plan: Plan, model: HookedModel) -> dict[tuple[str, str], Answer]:
    """What the tiny model really answers, without and with the plan."""
    texts = {("off", p.id): model.generate(p.text, 8) for p in loaded.prompts}
    with SteeringSession(model, plan) as steer:
        texts |= {("on", p.id): steer.generate(p.text, 8) for p in loaded.prompts}
    return {
        (arm, key): Answer(arm=arm, id=key, policy=arm, revision="none", text=text)
        for (arm, key), text in texts.items()
    }


def test_of_two_edits_the_one_that_does_everything_has_it_all(
    tmp_path: Path, tiny: FrozenModel, tiny_folder: Path
) -> None:
    """A strong vector beside one of strength 0: shares 1 and 0, CCS their mean; a rerun scores the rest."""
    policy, plan = policy_of(tmp_path, tiny, [vector("strong", 1, 20.0), vector("other", 2, 0.0)])
    loaded = suite_of(tmp_path)
    answers = answers_of(loaded, plan, HookedModel(tiny_folder, dtype="float32"))
    effect = effect_of(policy, plan, tmp_path, loaded, answers, seed=0)
    out = tmp_path / "contributions.jsonl"
    scores = score_effect(effect, plan, tiny_folder, "float32", out)
    measure, parts, note = contribution_measure(effect, scores, loaded, seed=0)
    assert [part.part for part in parts] == [
        "1.resid_post, steering vector strong",
        "2.resid_post, steering vector other",
    ]
    assert [part.share for part in parts] == [pytest.approx(1.0, abs=1e-5), pytest.approx(0.0, abs=1e-5)]
    assert (measure.value, measure.n) == (pytest.approx(0.5, abs=1e-5), 2)
    assert measure.data[0].n == len(effect.items) >= 3
    assert "2 parts, each ablated alone" in str(note)
    score_effect(effect, plan, Path("/nowhere"), "float32", out)
    lines = out.read_text().splitlines()
    out.write_text("\n".join(lines[:-1]) + "\n")
    again = score_effect(effect, plan, tiny_folder, "float32", out)
    assert again.found.keys() == scores.found.keys()
    assert len(out.read_text().splitlines()) == len(lines)


def test_without_a_part_the_plan_does_what_the_rest_does(
    tmp_path: Path, tiny: FrozenModel, tiny_folder: Path
) -> None:
    """Taken out of the plan, a vector or a head leaves the logits of the policy without it, to the bit."""
    heads = {"type": "head_scale", "selector": {"layer": 2, "heads": [0, 3]}, "scale": 0.0}
    rest = {"type": "head_scale", "selector": {"layer": 2, "heads": [3]}, "scale": 0.0}
    strong = vector("strong", 1, 5.0)
    policy, plan = policy_of(tmp_path, tiny, [strong, heads])
    parts = {part.name: part for part in parts_of(policy, plan, tmp_path)}
    assert list(parts) == ["1.resid_post, steering vector strong", "2.attn_z, head 0", "2.attn_z, head 3"]
    model = HookedModel(tiny_folder, dtype="float32")
    ids = model.tokens(PROMPTS[0])

    def logits(of: Plan) -> Any:
        with SteeringSession(model, of) as steer:
            return steer.logprobs(ids)

    _, only_heads = policy_of(tmp_path, tiny, [heads])
    _, one_head = policy_of(tmp_path, tiny, [strong, rest])
    assert logits(without_part(plan, parts["1.resid_post, steering vector strong"])).equal(logits(only_heads))
    assert logits(without_part(plan, parts["2.attn_z, head 0"])).equal(logits(one_head))
    assert not logits(plan).equal(logits(one_head))


def test_rows_of_an_adapter_are_parts_and_many_are_drawn(tmp_path: Path, tiny: FrozenModel) -> None:
    """Each row has its name; of more rows than can be ablated the same ones are drawn each time."""
    rows = np.random.default_rng(0).normal(size=(40, 32)).astype(np.float32)
    site = AdapterSite(rows, rows, np.zeros(40, np.float32))
    write_adapter(
        tmp_path / tiny.spec.name / "adapters" / "own",
        {Site(1, "resid_post"): site, Site(2, "resid_post"): site},
        target_class="general",
        model=tiny.spec,
    )
    edit = {
        "type": "lora_gate",
        "selector": {"block": "resid", "layers": [2]},
        "adapter": "own",
        "alpha": 1.0,
    }
    policy, plan = policy_of(tmp_path, tiny, [edit, vector("strong", 2, 1.0)])
    names = [part.name for part in parts_of(policy, plan, tmp_path)]
    assert names[0] == "2.resid_post, row 0 of own"
    assert names[39:] == ["2.resid_post, row 39 of own", "2.resid_post, steering vector strong"]
    loaded = suite_of(tmp_path)
    effect = effect_of(policy, plan, tmp_path, loaded, {}, seed=0)
    assert (len(effect.parts), effect.all_parts) == (MOST_PARTS, 41)
    assert effect == effect_of(policy, plan, tmp_path, loaded, {}, seed=0)
    assert effect.parts != effect_of(policy, plan, tmp_path, loaded, {}, seed=1).parts


def test_policy_that_changes_no_answer_has_no_share(
    tmp_path: Path, tiny: FrozenModel, tiny_folder: Path
) -> None:
    """There is nothing to take apart, and the card says so instead of giving a number."""
    policy, plan = policy_of(tmp_path, tiny, [vector("strong", 1, 0.0)])
    loaded = suite_of(tmp_path)
    answers = answers_of(loaded, plan, HookedModel(tiny_folder, dtype="float32"))
    assert changed_items(loaded, answers) == []
    effect = effect_of(policy, plan, tmp_path, loaded, answers, seed=0)
    scores = score_effect(effect, plan, Path("/nowhere"), "float32", tmp_path / "c.jsonl")
    measure, parts, note = contribution_measure(effect, scores, loaded, seed=0)
    assert "changes the answer to 0 of the prompts" in str(measure.absent)
    assert (parts, note) == ((), None)


def test_a_few_of_many_are_from_all_over_them() -> None:
    """The first is there, and what follows is evenly spread, none twice; of few enough all are taken."""
    assert spread(range(31), 16) == [place * 31 // 16 for place in range(16)]
    assert len(set(spread(range(17), 16))) == 16
    assert spread(range(17), 16)[-1] == 15
    assert spread("abc", 16) == ["a", "b", "c"]
    assert spread("", 16) == []


def test_stopped_attacks_are_taken_apart_first(tmp_path: Path) -> None:
    """With three of them they alone; with fewer any changed answer of the aim, from all over the suite."""
    loaded = suite_of(tmp_path)
    answers = {
        (arm, prompt.id): Answer(arm=arm, id=prompt.id, policy=arm, revision="none", text=arm)
        for arm in ("off", "on")
        for prompt in loaded.prompts
    }
    ids = [prompt.id for prompt in loaded.prompts]

    def taken(stopped: list[str]) -> list[str]:
        return [item.prompt.id for item in changed_items(loaded, answers, stopped)]

    assert taken(ids[2:5]) == ids[2:5]
    assert taken(ids[2:4]) == ids


def test_shares_are_of_sums_over_prompts() -> None:
    """CCS follows its formula; an effect that is not told from none gives no share."""
    effect = np.array([1.0, 2.0, 3.0, 2.0])
    lost = {"a": effect * 0.75, "b": effect * 0.25, "c": -effect * 0.1}
    measure, parts = causal_contribution(effect, lost, drawn_of=3)
    assert [part.share for part in parts] == [pytest.approx(share) for share in (0.75, 0.25, -0.1)]
    assert measure.value == pytest.approx(0.3)
    assert measure.interval is not None
    assert measure.interval.high - measure.interval.low < 1e-6
    drawn, _ = causal_contribution(effect, lost, drawn_of=30)
    assert drawn.interval is not None
    assert drawn.interval.high - drawn.interval.low > 0.1
    uneven, parts = causal_contribution(effect, {"a": np.array([1.0, 0.0, 0.0, 0.0])}, drawn_of=1)
    assert parts[0].share == pytest.approx(1 / 8)
    assert parts[0].interval.low == 0
    assert parts[0].interval.high > 0.3
    nothing, parts = causal_contribution(np.array([1.0, -1.0, 0.5, -0.5]), {"a": effect}, drawn_of=1)
    assert "not told from none" in str(nothing.absent)
    assert parts == ()
    assert uneven.n == 1
