"""The learned conditional refusal: probe, edit, data split and job, on a tiny model."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from discovery.data.coded_requests import CODES, decoded, encode, followed
from discovery.data.prompt_variants import Surroundings, conversation, conversation_ids, words_of
from discovery.data.rewritten_requests import REWRITINGS, rewritten
from discovery.data.sequences import batches
from discovery.data.sources import DataList, Source, sha256_of_file
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.gates import learned_gate, prompt_activations
from discovery.gates.fit_gate import GateFit
from discovery.gates.gate_artifact import policy_text, write_gate
from discovery.gates.gate_data import Groups, load_gate_data
from discovery.gates.gate_probe import auroc, fit_probe, prompt_end_features, threshold_at
from discovery.gates.gate_settings import EditSettings, GateSettings
from discovery.gates.gate_trade import trade
from discovery.gates.gated_answers import edited_answers
from discovery.gates.gated_edit import Example, losses, train_edit
from discovery.gates.joined_probes import mean_of, read_numbers
from discovery.gates.learned_gate import (
    LearnedGate,
    new_gate,
    shuffled,
    train_gate,
    train_probes,
)
from discovery.gates.low_rank import LowRankRows
from discovery.gates.prompt_activations import PromptActivations
from discovery.gates.refusal_sentences import targets
from discovery.jobs.training_checkpoint import save_checkpoint
from interpretops.artifacts.adapter import open_adapter
from interpretops.compile import compile_policy
from interpretops.plan import Site
from interpretops.policy import load_policy
from interpretops.refusal_detector import is_coherent, is_refusal
from interpretops.steering.hooked_model import HookedModel
from interpretops.steering.session import SteeringSession
from steering_kernels.ops import attention_probe_reference

EDIT = EditSettings(layers=(2, 3), rank=4, steps=6, batch=2)
GATE = GateSettings((1, 2), heads=2, examples=60, epochs=3, batch_tokens=256, learning_rate=1e-2)


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
    texts = [words_of(prompt) for prompt in train]
    assert any(text.startswith("Well. BREAK") or text.endswith("NOW Thanks.") for text in texts)


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


def _edit(tiny: FrozenModel, scale: float) -> LowRankRows:
    edit = LowRankRows(tiny.spec.hidden_size, 4, {2: 1.0, 3: 1.0}, seed=0)
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


def test_edited_answers_are_those_of_each_prompt_alone(tiny: FrozenModel) -> None:
    """A padded batch from cached prompts writes what the model writes to one prompt, read anew at every step
    with the edit acting from the last token of the prompt on.
    """
    prompts = [tiny.chat_ids("one"), tiny.chat_ids("another, longer one"), tiny.chat_ids("two")]
    edit = _edit(tiny, 300.0)
    found = edited_answers(tiny, edit, prompts, 8)
    assert found != edited_answers(tiny, None, prompts, 8)
    for prompt, answer in zip(prompts, found, strict=True):
        start, ids = len(prompt) - 1, list(prompt)

        def from_the_end(at: Any, start: int = start) -> Any:
            return lambda x: torch.cat([x[:, :start], at(x[:, start:])], 1)

        edits = {int(layer): from_the_end(edit.at(int(layer))) for layer in edit.a}
        with torch.no_grad(), tiny.edited(edits):
            for _ in range(8):
                token = int(tiny.network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
                if token in tiny.stop_tokens:
                    break
                ids.append(token)
        assert answer == ids[len(prompt) :]


def test_edit_learns_to_refuse(tiny: FrozenModel, tmp_path: Path) -> None:
    """Training lowers the cross-entropy of the taught answer; a checkpoint of another run is refused."""
    settings = replace(EDIT, steps=24, batch=1, learning_rate=1e-2)
    harmful = [Example(tuple(tiny.chat_ids("DO BAD")), tuple(tiny.text_ids("no no no")))]
    benign = [Example(tuple(tiny.chat_ids("do good")), tuple(tiny.text_ids("yes yes")))]
    before = float(losses(tiny, _edit(tiny, 1.0), harmful, benign)[0])

    def run(identity: object) -> LowRankRows:
        return train_edit(
            tiny, _edit(tiny, 1.0), lambda _: (harmful, benign), settings, tmp_path / "edit", identity
        )

    assert float(losses(tiny, run("one"), harmful, benign)[0]) < before
    with pytest.raises(DiscoveryError, match="belongs to another run"):
        run("another")


PROMPTS = [
    (text.upper() if shouts else text, shouts)
    for n in range(40)
    for shouts in (True, False)
    for text in (f"move the thing {n} " * (1 + n % 2),)
]


def _trained(tiny: FrozenModel, settings: GateSettings, work: Path, identity: object = "it") -> LearnedGate:
    ids = [tuple(tiny.chat_ids(text)) for text, _ in PROMPTS]
    activations = PromptActivations(tiny, ids, settings.layers, work)
    gate = new_gate(settings, activations, [1e4, 1e4])
    return train_gate(gate, activations, [shouts for _, shouts in PROMPTS], work, identity)


def test_gate_learns_what_tells_the_sides_apart(tiny: FrozenModel, tmp_path: Path) -> None:
    """After training, every shouting prompt reads above every quiet one, and padding changes no reading."""
    gate = _trained(tiny, replace(GATE, epochs=12), tmp_path)
    prompts = [tiny.chat_ids(text) for text in ("MOVE IT", "PLEASE TAKE THE THING", "move it", "please take")]
    readings = gate.readings(tiny, prompts)
    assert float(readings[:2].min()) > float(readings[2:].max())
    alone = torch.cat([gate.readings(tiny, [ids]) for ids in prompts])
    torch.testing.assert_close(readings, alone, rtol=1e-3, atol=1e-3)


def test_several_probes_are_read_as_their_mean(tiny: FrozenModel, tmp_path: Path) -> None:
    """Two probes of two heads become one gate of four, which reads what they read on the average."""
    ids = [tuple(tiny.chat_ids(text)) for text, _ in PROMPTS]
    activations = PromptActivations(tiny, ids, GATE.layers, tmp_path)
    of_class = [shouts for _, shouts in PROMPTS]
    both = mean_of(train_probes(replace(GATE, probes=2), activations, [1e4, 1e4], of_class, tmp_path, "it"))
    alone = [_trained(tiny, replace(GATE, seed=seed), tmp_path / str(seed)) for seed in (0, 1)]
    assert both.query.shape[:2] == (2, 4)
    readings = [gate.readings(tiny, ids) for gate in (both, *alone)]
    assert not torch.allclose(readings[1], readings[2], atol=1e-2)
    torch.testing.assert_close(readings[0], (readings[1] + readings[2]) / 2, rtol=1e-4, atol=1e-4)


def test_joined_probe_is_read_with_the_others(tiny: FrozenModel, listed: DataList, tmp_path: Path) -> None:
    """A gate with a probe of an earlier run reads the mean of both, and its record names the file."""
    data = load_gate_data(listed, 0)
    fits = [GateFit(tiny, data, replace(GATE, seed=seed), EDIT, tmp_path / str(seed)) for seed in (0, 1)]
    folder = tmp_path / "artifacts" / "tiny-llama" / "adapters" / "first"
    write_gate(fits[0], fits[0].train(), listed, folder, "jailbreak", 0.5, {})
    probe = folder / "probe.safetensors"
    both = GateFit(tiny, data, replace(GATE, seed=1), EDIT, tmp_path / "1", [probe])
    for name, readings in both.readings.items():
        expected = (fits[0].readings[name] + fits[1].readings[name]) / 2
        torch.testing.assert_close(readings, expected, rtol=1e-3, atol=1e-3)
    write_gate(both, both.train(), listed, tmp_path / "second", "jailbreak", 0.5, {})
    joined = json.loads((tmp_path / "second" / "run.json").read_text())["settings"]["joined"]
    assert joined == [{"file": "probe.safetensors", "sha256": sha256_of_file(probe)}]
    with pytest.raises(
        DiscoveryError, match=r"^124 heads to train and 8 of joined probes, but an engine keeps"
    ):
        GateFit(tiny, data, replace(GATE, heads=31, probes=2), EDIT, tmp_path / "2", [probe, probe])
    with pytest.raises(DiscoveryError, match=r"reads at layers \[1, 2\], but the gate at \[0, 2\]"):
        read_numbers(probe, tiny.spec, (0, 2))
    with pytest.raises(DiscoveryError, match="was trained on another model than"):
        read_numbers(probe, replace(tiny.spec, fingerprint="0" * 64), (1, 2))
    with pytest.raises(DiscoveryError, match=r"adapter_model.safetensors: .*; name the probe.safetensors"):
        read_numbers(folder / "adapter_model.safetensors", tiny.spec, (1, 2))


def test_group_with_a_weight_is_drawn_more_often(tiny: FrozenModel, listed: DataList, tmp_path: Path) -> None:
    """A weight of nine moves a group of the same size to nine of ten draws; an unknown group is named."""
    data = load_gate_data(listed, 0)
    groups: Groups = {
        "benign_a": [f"move slowly {n}" for n in range(40)],
        "benign_b": [f"take {n}" for n in range(40)],
    }
    data = replace(data, train=data.train | groups, plain_text=(), openings=())
    fit = GateFit(tiny, data, replace(GATE, weights=(("benign_a", 9.0),)), EDIT, tmp_path)
    chance = random.Random(0)
    drawn = [fit._draw(chance) for _ in range(800)]
    texts = [tiny.tokenizer.decode(ids).lower() for ids, of_class in drawn if not of_class]
    assert 0.75 < sum("slowly" in text for text in texts) / len(texts) < 0.97
    with pytest.raises(DiscoveryError, match=r"weights = 'benign_c', but the training data has no"):
        GateFit(tiny, data, replace(GATE, weights=(("benign_c", 2.0),)), EDIT, tmp_path)


def test_threshold_keeps_each_budget_over_groups_that_count_the_same(
    tiny: FrozenModel, listed: DataList, tmp_path: Path
) -> None:
    """A borderline group of 4 prompts counts as much as one of 40; what is not refused does not count."""
    fit = GateFit(tiny, load_gate_data(listed, 0), replace(GATE, borderline_budget=0.25), EDIT, tmp_path)
    fit.data = replace(
        fit.data, select={"select_borderline_few": [""] * 4, "select_borderline_many": [""] * 40}
    )
    few, many = ([float(n) for n in range(count)] for count in (4, 40))
    fit.readings = {"select_borderline_few": torch.tensor(few), "select_borderline_many": torch.tensor(many)}
    outcomes: dict[str, list[dict[str, Any]]] = {
        "select_borderline_few": [{"reading": reading + 50, "refused": True} for reading in few],
        "select_borderline_many": [{"reading": reading, "refused": reading != 39} for reading in many],
    }
    # 53, 52 are half of the few, a quarter in all: the next one, 51, is one too many.
    assert fit.choose_threshold(outcomes) == pytest.approx(51.0, abs=1e-3)


def test_threshold_keeps_the_budget_of_the_worst_source(
    tiny: FrozenModel, listed: DataList, tmp_path: Path
) -> None:
    """A benign group of 100 prompts that is refused more than its budget raises the threshold until it is
    not; one of 99 does not.
    """
    settings = replace(GATE, benign_budget=0.5, source_budget=0.02)
    fit = GateFit(tiny, load_gate_data(listed, 0), settings, EDIT, tmp_path)
    for size, expected in ((100, 97.0), (99, 0.0)):
        names: Groups = {"select_benign_easy": [""] * 100, "select_benign_hard": [""] * size}
        fit.data = replace(fit.data, select=dict(names))
        fit.readings = {name: torch.arange(float(len(rows))) for name, rows in names.items()}
        outcomes: dict[str, list[dict[str, Any]]] = {
            "select_benign_easy": [{"reading": float(n), "refused": False} for n in range(100)],
            "select_benign_hard": [{"reading": float(n), "refused": True} for n in range(size)],
        }
        assert fit.choose_threshold(outcomes) == pytest.approx(expected, abs=2e-3)


def test_gates_numbers_read_plain_activations(tiny: FrozenModel, tmp_path: Path) -> None:
    """What goes into the policy gives the op's reference the readings that training saw."""
    gate = _trained(tiny, GATE, tmp_path)
    ids = tiny.chat_ids("Move the THING.")
    tokens, mask = tiny.pad([ids])
    x = tiny.residuals(tokens, mask, GATE.layers)
    reading = sum(
        attention_probe_reference(x[layer][0], **numbers) or math.nan  # type: ignore[misc, arg-type]
        for layer, numbers in gate.numbers().items()
    )
    assert reading == pytest.approx(float(gate.readings(tiny, [ids])), abs=1e-3)


def test_gate_does_not_read_sinks(tiny: FrozenModel, tmp_path: Path) -> None:
    """A token past the norm bound changes no reading, however large it is."""
    gate = _trained(tiny, GATE, tmp_path)
    x = torch.randn(1, 5, 2, tiny.spec.hidden_size)
    real = torch.ones(1, 5, dtype=torch.bool)
    without = gate(x[:, 1:], real[:, 1:])
    x[:, 0] = 1e6
    torch.testing.assert_close(gate(x, real), without)


def test_killed_gate_training_ends_with_the_same_gate(
    tiny: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed after its first checkpoint ends with the numbers of an unbroken run."""
    whole = _trained(tiny, GATE, tmp_path / "whole")
    real = save_checkpoint

    def dies(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(learned_gate, "save_checkpoint", dies)
    with pytest.raises(KeyboardInterrupt):
        _trained(tiny, GATE, tmp_path / "broken")
    monkeypatch.undo()
    resumed = _trained(tiny, GATE, tmp_path / "broken")
    for (name, value), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=name)
    with pytest.raises(DiscoveryError, match="belongs to another run"):
        _trained(tiny, GATE, tmp_path / "broken", "else")
    (tmp_path / "broken" / "gate.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(DiscoveryError, match="is not a finished step"):
        _trained(tiny, GATE, tmp_path / "broken")


def test_activations_are_computed_once(
    tiny: FrozenModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed between batches resumes after the last one stored; a finished one runs no model, and
    neither does another choice from the same prompts.
    """
    monkeypatch.setattr(prompt_activations, "SHARD_BATCHES", 1)
    prompts = [tuple(tiny.chat_ids("x" * n)) for n in range(1, 60)]
    monkeypatch.setattr(prompt_activations, "batches", lambda listed: list(batches(listed, 96)))
    whole = PromptActivations(tiny, prompts, (1, 2), tmp_path / "whole")
    real, left = FrozenModel.residuals, [14]

    def dies(*arguments: object, **more: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(FrozenModel, "residuals", dies)
    with pytest.raises(KeyboardInterrupt):
        PromptActivations(tiny, prompts, (1, 2), tmp_path / "broken")
    parts = prompt_activations.batches([list(ids) for ids in prompts])  # type: ignore[attr-defined]
    left[0] = len(list(parts)) - 14
    resumed = PromptActivations(tiny, prompts, (1, 2), tmp_path / "broken")
    assert left[0] == 0
    for place in range(len(prompts)):
        np.testing.assert_array_equal(resumed.of(place), whole.of(place))
    some = PromptActivations(tiny, [prompts[30], prompts[3], prompts[3]], (1, 2), tmp_path / "broken")
    np.testing.assert_array_equal(some.of(1), whole.of(3))
    np.testing.assert_array_equal(some.of(2), whole.of(3))
    assert left[0] == 0


def test_damaged_activations_are_refused(tiny: FrozenModel, tmp_path: Path) -> None:
    """A shard whose bytes changed, and a record that was cut, are named, with what to do."""
    prompts = [tuple(tiny.chat_ids("x" * n)) for n in range(1, 9)]
    PromptActivations(tiny, prompts, (1, 2), tmp_path)
    (shard,) = tmp_path.glob("*/*.npy")
    damaged = bytearray(shard.read_bytes())
    damaged[-1] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(DiscoveryError, match=r"npy: was changed or damaged; delete it and its .json"):
        PromptActivations(tiny, prompts, (1, 2), tmp_path).of(0)
    (record,) = tmp_path.glob("*/*.json")
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(DiscoveryError, match=r"json: is (not a finished step|damaged)"):
        PromptActivations(tiny, prompts, (1, 2), tmp_path)


def test_longest_window_decides_and_short_prompts_are_one(tiny: FrozenModel, tmp_path: Path) -> None:
    """With a window the reading is the largest over windows of the reading of those tokens alone, in a padded
    batch too; a prompt that is no longer than the window reads as without.
    """
    gate = _trained(tiny, GATE, tmp_path)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 41, 2, tiny.spec.hidden_size, generator=generator)
    lengths = [41, 23, 8]
    real = torch.arange(41)[None] < torch.tensor(lengths)[:, None]
    plain = [float(gate(x[row : row + 1, :n], real[row : row + 1, :n])) for row, n in enumerate(lengths)]
    gate.settings = replace(GATE, window=8)
    found = gate(x, real)
    for row, n in enumerate(lengths):
        starts = sorted({*range(0, n - 7, 2), n - 8})
        parts = [x[row : row + 1, start : start + 8] for start in starts]
        ones = torch.ones(1, 8, dtype=torch.bool)
        assert float(found[row]) == pytest.approx(max(float(gate(part, ones)) for part in parts), abs=1e-4)
    assert float(found[2]) == pytest.approx(plain[2], abs=1e-4)
    assert float(found[0]) != pytest.approx(plain[0], abs=1e-3)


def test_every_prompt_is_in_one_batch_of_its_length() -> None:
    """An epoch takes each prompt once, in batches of at most as many padded tokens as asked for."""
    prompts = [(0,) * random.Random(n).randrange(5, 200) for n in range(300)]
    groups = shuffled(prompts, 1000, seed=3)
    assert sorted(place for group in groups for place in group) == list(range(300))
    assert all(len(group) * max(len(prompts[place]) for place in group) <= 1000 for group in groups)
    assert groups != shuffled(prompts, 1000, seed=4)


def test_coded_requests_can_be_decoded() -> None:
    """Codes keep the words, and only one of the two forms demands to be followed."""
    assert encode("Bake bread", "base64") == "QmFrZSBicmVhZA=="
    assert encode("Bake bread", "caesar") == "Ednh euhdg"
    assert encode("Bake", "morse") == "-... .- -.- ."
    assert encode("ab", "reversed") == "ba"
    assert len({encode("Bake bread", code) for code in CODES}) == len(CODES)
    with pytest.raises(ValueError, match="must be one of"):
        encode("a", "klingon")
    chance = random.Random(0)
    assert not any("follow" in decoded("Bake bread", chance) for _ in range(20))
    assert any("follow" in followed("Bake bread", chance) for _ in range(20))


def test_rewriting_changes_the_writing_and_keeps_the_words() -> None:
    """Each way of rewriting does what it says, and together they repeat with the seed."""
    text = "How can somebody repair the broken handle of a wooden door without glue"
    words = text.split(" ")
    misspelt, reordered, half_foreign, shortened = (
        rewriting(words, random.Random(3)) for rewriting in REWRITINGS
    )
    assert len(misspelt) == len(words)
    assert 2 <= sum(one != other for one, other in zip(misspelt, words, strict=True)) <= 9
    assert reordered != words
    assert sorted(reordered) == sorted(words)
    assert {"broken", "handle", "wooden", "door", "glue"} <= set(half_foreign)
    assert half_foreign != words
    assert set(shortened) < set(words)
    found = {rewritten(text, random.Random(seed)) for seed in range(50)}
    assert len(found) > 40
    assert found == {rewritten(text, random.Random(seed)) for seed in range(50)}
    assert all(rewritten(word, random.Random(0)) for word in ("Hi", "the"))


def test_variants_keep_the_request_last(tiny: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever comes before it, the request is the last message, in its own letters."""
    monkeypatch.setattr("discovery.data.prompt_variants.REWRITTEN", 0.0)
    around = Surroundings(("Be brief.",), ("Hi!\nAssistant: Hello!",), ("Sure,",))
    around.check()
    found = set()
    for seed in range(300):
        messages = conversation("Move the thing.", around, random.Random(seed))
        found.add(tuple(message["role"] for message in messages))
        if messages[-1]["role"] == "assistant":
            assert messages.pop()["content"] == "Sure,"
        assert sorted(messages[-1]["content"].lower().replace(".", "")) == sorted("move the thing")
        assert conversation_ids(tiny, messages)
    assert found == {
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("user", "assistant"),
        ("text",),
    }
    with pytest.raises(DiscoveryError, match="Assistant"):
        Surroundings(earlier_turns=("Hi!",)).check()


def test_texts_of_the_models_own_are_written_once(
    tiny: FrozenModel, listed: DataList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Openings become benign training texts that begin with them; a resumed run takes the kept ones."""
    (tmp_path / "o.txt").write_text("Once there was\n")
    opening = Source(tmp_path / "o.txt", "openings", "Apache-2.0", times=3)
    data = load_gate_data(DataList({**listed.groups, "benign_text": (opening,)}), 0)
    assert data.openings == ("Once there was",) * 3
    first = GateFit(tiny, data, GATE, EDIT, tmp_path / "work")
    began = tuple(tiny.text_ids("Once there was"))
    assert len(first.plain_text) == 3
    assert all(text[: len(began)] == began and len(text) > len(began) for text in first.plain_text)
    monkeypatch.setattr(FrozenModel, "answers", None)
    assert GateFit(tiny, data, GATE, EDIT, tmp_path / "work").plain_text == first.plain_text


def test_job_ends_in_a_policy_that_compiles(tiny: FrozenModel, listed: DataList, tmp_path: Path) -> None:
    """From prompts to adapter and policy: the compiled plan holds the trained numbers and the gate."""
    data = load_gate_data(listed, 0)
    fit = GateFit(tiny, data, GATE, EDIT, tmp_path / "work")
    edit = fit.train()
    outcomes = fit.outcomes(edit, [*data.select, *data.test])
    threshold = fit.choose_threshold(outcomes)
    report = fit.report(outcomes, threshold)
    assert report["test_harmful"]["n"] == 8
    artifacts = tmp_path / "artifacts"
    folder = artifacts / "tiny-llama" / "adapters" / "tiny-refusal"
    write_gate(fit, edit, listed, folder, "jailbreak", threshold, report)
    assert set(open_adapter(folder).sites) == {Site(layer, "resid_post") for layer in (2, 3)}
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
    assert (opened.scope, opened.latched, opened.site) == ("prompt", True, Site(2, "resid_post"))
    assert float(opened.cut[0]) == pytest.approx(threshold)
    assert [part.site.layer for part in opened.probe] == [1, 2]
    for part in opened.probe:
        for name, tensor in fit.gate.numbers()[part.site.layer].items():
            np.testing.assert_allclose(getattr(part, name), tensor.numpy(), rtol=1e-5)


def test_trade_counts_what_each_threshold_refuses() -> None:
    """A point for each borderline prompt refused; what the edit does not make refuse is not refused."""

    def group(*readings: float, kept: float | None = None) -> list[dict[str, Any]]:
        return [{"reading": reading, "refused": reading != kept} for reading in readings]

    outcomes = {
        "test_harmful_a": group(5, 3, 1),
        "test_jailbreak_b": group(4, kept=4),
        "test_borderline": group(4.5, 2, 0.5, kept=0.5),
        "test_benign": group(2.5, -1),
        "select_borderline": group(9),
    }
    assert trade(outcomes) == [
        {"threshold": 4.5, "harmful": 0.25, "borderline": 0.0, "plain": 0.0},
        {"threshold": 2.0, "harmful": 0.5, "borderline": 0.3333, "plain": 0.5},
    ]
    assert trade({"test_harmful": group(1)}) == []


def test_session_decides_as_the_gate_was_trained(tiny_folder: Path, listed: DataList, tmp_path: Path) -> None:
    """The compiled plan opens its gate for exactly the prompts whose reading exceeds the threshold."""
    tiny = FrozenModel(tiny_folder, torch.float32)
    data = load_gate_data(listed, 0)
    fit = GateFit(tiny, data, replace(GATE, epochs=6), EDIT, tmp_path / "work")
    names = ["test_harmful", "test_benign"]
    prompts = [words_of(prompt) for name in names for prompt in data.test[name]]
    readings = torch.cat([fit.readings[name] for name in names])
    threshold = round(float(readings.median()), 3)
    folder = tmp_path / "artifacts" / tiny.spec.name / "adapters" / "tiny-refusal"
    write_gate(fit, fit.train(), listed, folder, "jailbreak", threshold, {})
    path = tmp_path / "tiny.yaml"
    path.write_text(policy_text(fit, "tiny-refusal", "tiny", "jailbreak", threshold))
    model = HookedModel(str(tiny_folder), dtype="float32")
    with SteeringSession(model, load_policy(path), artifacts=tmp_path / "artifacts") as steer:
        for prompt, reading in zip(prompts, readings.tolist(), strict=True):
            if abs(reading - threshold) > 1e-3:
                steer.generate(prompt, max_new_tokens=2)
                assert (steer.receipt.gates_fired > 0) == (reading > threshold), prompt


def test_edit_before_its_gate_is_refused(tiny: FrozenModel, listed: DataList, tmp_path: Path) -> None:
    """An edit at a layer before the gate's cannot be controlled by it."""
    with pytest.raises(DiscoveryError, match="the gate reads at the later layer"):
        GateFit(tiny, load_gate_data(listed, 0), GateSettings((3,)), EDIT, tmp_path)


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
