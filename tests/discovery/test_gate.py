"""The learned conditional refusal: probe, edit, data split and job, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from discovery import gated_edit
from discovery.errors import DiscoveryError
from discovery.fit_gate import GateFit, GateSettings
from discovery.frozen_model import FrozenModel
from discovery.gate_artifact import policy_text, write_gate
from discovery.gate_data import load_gate_data
from discovery.gate_probe import auroc, fit_probe, prompt_end_features, threshold_at
from discovery.gated_answers import edited_answers
from discovery.gated_edit import EditSettings, Example, GatedEdit, losses, train_edit
from discovery.refusal import is_coherent, is_refusal, targets
from discovery.sources import DataList, Source
from interpretops.adapter import open_adapter
from interpretops.compile import compile_policy
from interpretops.plan import Site
from interpretops.policy import load_policy

EDIT = EditSettings(layers=(2, 3), rank=4, steps=6, batch=2)


def _source(folder: Path, name: str, prompts: list[str], **more: object) -> Source:
    path = folder / f"{name}.json"
    path.write_text(json.dumps(prompts))
    return Source(path, "prompts", "Apache-2.0", name, **more)  # type: ignore[arg-type]


@pytest.fixture
def listed(tmp_path: Path) -> DataList:
    """Harmful prompts shout, benign ones do not."""
    harmful = [f"BREAK THE THING NUMBER {i} NOW" for i in range(24)]
    benign = [f"please water plant number {i}" for i in range(24)]
    return DataList(
        {
            "wrappers": (_source(tmp_path, "w", ["Well. {request}", "{request} Thanks."]),),
            "harmful_a": (
                _source(tmp_path, "ha", harmful[:14]),
                _source(tmp_path, "hw", harmful[:3], wrap=True),
            ),
            "benign_a": (_source(tmp_path, "ba", benign[:14]),),
            "select_harmful": (_source(tmp_path, "hs", harmful[12:18]),),
            "select_benign": (_source(tmp_path, "bs", benign[12:18]),),
            "test_harmful": (_source(tmp_path, "ht", harmful[16:]),),
            "test_benign": (_source(tmp_path, "bt", benign[16:]),),
        }
    )


def test_no_prompt_is_on_two_sides(listed: DataList) -> None:
    """A prompt of a test group is in no other group, and one of a selection group not in training."""
    data = load_gate_data(listed, 0)
    train, select, test = (
        {prompt for prompts in groups.values() for prompt in prompts}
        for groups in (data.train, data.select, data.test)
    )
    assert not train & select
    assert not train & test
    assert not select & test
    assert len(test) == 16
    assert any(prompt.startswith("Well. BREAK") or prompt.endswith("NOW Thanks.") for prompt in train)


@pytest.mark.parametrize(
    ("drop", "expected"),
    [
        (("benign_a",), "hold no benign prompts"),
        (("harmful_a",), "hold no harmful prompts"),
        (("select_benign",), "select_ groups hold no benign"),
        (("wrappers",), "there are no wrappers"),
    ],
)
def test_one_sided_data_is_refused(listed: DataList, drop: tuple[str, ...], expected: str) -> None:
    """Data that lack a side are refused, and the side is named."""
    groups = {name: sources for name, sources in listed.groups.items() if name not in drop}
    with pytest.raises(DiscoveryError, match=expected):
        load_gate_data(DataList(groups), 0)


def test_noncommercial_data_may_be_tested_on_and_not_trained_on(listed: DataList) -> None:
    """A non-commercial set is taken for a test group, and refused for training and selection."""
    for group, allowed in (("test_benign", True), ("benign_a", False), ("select_benign", False)):
        sources = tuple(replace(s, licence="CC BY-NC 4.0") for s in listed.groups[group])
        data = DataList({**listed.groups, group: sources})
        if allowed:
            load_gate_data(data, 0)
        else:
            with pytest.raises(DiscoveryError, match="CC BY-NC"):
                load_gate_data(data, 0)


def test_probe_finds_a_planted_direction() -> None:
    """A probe separates what a planted direction separates; its readings have unit variance."""
    generator = torch.Generator().manual_seed(0)
    planted = torch.nn.functional.normalize(torch.randn(32, generator=generator), dim=0)
    noise = torch.randn(400, 32, generator=generator)
    positive, negative = noise[:200] + 3 * planted, noise[200:] - 3 * planted
    probe = fit_probe(positive, negative)
    assert auroc(probe.read(positive), probe.read(negative)) > 0.99
    assert float(torch.cat([probe.read(positive), probe.read(negative)]).std()) == pytest.approx(1, abs=0.01)
    assert float(torch.nn.functional.cosine_similarity(probe.direction, planted, dim=0)) > 0.8
    above = probe.read(negative) > threshold_at(probe.read(negative), 0.1)
    assert int(above.sum()) == 20


def test_auroc_counts_ties_half() -> None:
    """AUROC is 1 for separated, 0.5 for equal readings."""
    assert auroc(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0
    assert auroc(torch.ones(4), torch.ones(3)) == 0.5


def test_features_are_read_at_the_last_prompt_token(tiny: FrozenModel) -> None:
    """Padding in a batch does not change what is read."""
    prompts = [tiny.chat_ids(text) for text in ("short", "a prompt that is quite a bit longer")]
    together = prompt_end_features(tiny, prompts, [1, 3])
    for row, ids in enumerate(prompts):
        tokens, mask = tiny.pad([ids])
        for layer, x in tiny.residuals(tokens, mask, [1, 3]).items():
            torch.testing.assert_close(together[layer][row], x[0, -1], rtol=1e-4, atol=1e-4)


def _edit(tiny: FrozenModel, scale: float) -> GatedEdit:
    edit = GatedEdit(tiny.spec.hidden_size, 4, {2: 1.0, 3: 1.0}, seed=0)
    with torch.no_grad():
        for write in edit.b.values():
            write.mul_(scale)
    return edit


def test_edit_of_zero_size_changes_nothing(tiny: FrozenModel) -> None:
    """With B = 0 the benign loss and the firing are zero, and answers are the model's own."""
    example = Example(tuple(tiny.chat_ids("hello")), tuple(tiny.text_ids("good day to you")))
    _, stay, firing = losses(tiny, _edit(tiny, 0.0), [example], [example, example])
    assert float(stay) == pytest.approx(0, abs=1e-6)
    assert float(firing) == 0
    prompts = [tiny.chat_ids("one"), tiny.chat_ids("another, longer one")]
    own = edited_answers(tiny, None, prompts, 8)
    assert edited_answers(tiny, _edit(tiny, 0.0), prompts, 8) == own
    assert own == [
        [token for token in answer if token not in tiny.stop_ids] for answer in tiny.answers(prompts, 8)
    ]
    assert edited_answers(tiny, _edit(tiny, 300.0), prompts, 8) != own


def test_killed_training_ends_with_the_same_edit(
    tiny: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed after its checkpoint ends with the rows of an unbroken run, and the loss falls."""
    settings = replace(EDIT, steps=44, batch=1, learning_rate=1e-2)
    harmful = [Example(tuple(tiny.chat_ids("DO BAD")), tuple(tiny.text_ids("no no no")))]
    benign = [Example(tuple(tiny.chat_ids("do good")), tuple(tiny.text_ids("yes yes")))]

    def run(name: str) -> GatedEdit:
        return train_edit(
            tiny, _edit(tiny, 1.0), lambda _: (harmful, benign), settings, tmp_path / name, {"of": "test"}
        )

    before = float(losses(tiny, _edit(tiny, 1.0), harmful, benign)[0])
    whole = run("whole")
    assert float(losses(tiny, whole, harmful, benign)[0]) < before
    real = gated_edit._save

    def dies(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(gated_edit, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        run("broken")
    monkeypatch.undo()
    resumed = run("broken")
    for (name, value), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=name)
    with pytest.raises(DiscoveryError, match="of another training"):
        train_edit(tiny, _edit(tiny, 1.0), lambda _: (harmful, benign), settings, tmp_path / "broken", {})


def test_job_ends_in_a_policy_that_compiles(tiny: FrozenModel, listed: DataList, tmp_path: Path) -> None:
    """From prompts to adapter, probe and policy: the compiled plan holds the trained numbers and the gate."""
    data = load_gate_data(listed, 0)
    gate = GateSettings(1, loose_rate=0.5)
    fit = GateFit(tiny, data, gate, EDIT, tmp_path / "work")
    edit = fit.train()
    outcomes = fit.outcomes(edit, [*data.select, *data.test])
    threshold = fit.choose_threshold(outcomes)
    report = fit.report(outcomes, threshold)
    assert report["test_harmful"]["n"] == 8
    artifacts = tmp_path / "artifacts"
    folder = artifacts / "tiny-llama" / "adapters" / "tiny-refusal"
    write_gate(fit, edit, listed, folder, "jailbreak", threshold, report)
    assert set(open_adapter(folder).sites) == {Site(2, "resid_post"), Site(3, "resid_post")}
    path = tmp_path / "tiny.yaml"
    path.write_text(policy_text(fit, "tiny-refusal", "tiny", "jailbreak", threshold))
    plan = compile_policy(load_policy(path), model=tiny.spec, artifacts=artifacts)
    read, bias, write = edit.rows(3)
    units = plan.edits[Site(3, "resid_post")].units
    np.testing.assert_allclose(units.read, read.numpy(), rtol=1e-5)
    np.testing.assert_allclose(units.write, write.numpy(), rtol=1e-5)
    np.testing.assert_allclose(units.bias, bias.numpy(), rtol=1e-5)
    assert (units.threshold == 0).all()
    opened = plan.gates[int(units.gate[0])]
    assert (opened.scope, opened.latched, opened.site) == ("prompt_end", True, Site(1, "resid_post"))
    np.testing.assert_allclose(opened.read[0], fit.probe.direction.numpy(), rtol=1e-5)
    assert float(opened.cut[0]) == pytest.approx(threshold)


def test_edit_before_its_gate_is_refused(tiny: FrozenModel, listed: DataList, tmp_path: Path) -> None:
    """An edit at a layer before the gate's cannot be controlled by it."""
    with pytest.raises(DiscoveryError, match="after that"):
        GateFit(tiny, load_gate_data(listed, 0), GateSettings(3), EDIT, tmp_path)


def test_judge_knows_refusals_and_gibberish() -> None:
    """Refusals are recognised at the beginning of an answer only; taught ones are coherent, loops are not."""
    for text in targets(""):
        assert is_refusal(text)
        assert is_coherent(text)
    assert is_refusal("I cannot assist with that request.")
    assert is_refusal("I’m sorry for any confusion, but as a chatbot I can’t do that.")
    assert not is_refusal("Here is a recipe for soup. Boil water.")
    assert not is_refusal("Sure! " + "Step one is easy. " * 12 + "I'm sorry.")
    assert not is_coherent("I'm sorry I'm sorry I'm sorry I'm sorry I'm sorry I'm sorry I'm sorry")
    assert not is_coherent("no")
