"""The parts of a proposal: the split of a contrast, gates as masks, features by their sides, origins."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from discovery.data.sources import sha256_of_file
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.gates.contrast import PARTS, SIDES, Judged, read_contrast, subset
from discovery.gates.gate_probe import auroc
from discovery.proposals.activation_readings import answer_means, feature_auroc
from discovery.proposals.answer.edits import Action, rank_features
from discovery.proposals.answer.gates import feature_gates, probe_gates
from discovery.proposals.answer.grid import Point, best
from discovery.proposals.judging import fails, shows
from discovery.proposals.origin import from_circuit, from_features
from interpretops.artifacts.dictionary import open_dictionary
from interpretops.plan import ModelSpec
from interpretops.policy import Origin
from interpretops.steering.dictionary_features import DictionaryFeatures

CIRCUIT_ID = f"cx_{'0' * 26}"
NODES = [
    {"id": "input", "kind": "input", "score": 0.0},
    {"id": "a1.h2", "kind": "head", "layer": 1, "head": 2, "score": 0.1, "ccs": 0.05},
    {"id": "m2", "kind": "mlp", "layer": 2, "score": 0.1, "ccs": -0.4},
    {"id": "logits", "kind": "logits", "score": 0.0},
]


def test_no_prompt_is_in_two_parts(class_file: Callable[..., Path]) -> None:
    """Every prompt of every side is in one part, and the same seed gives the same split."""
    contrast = read_contrast(class_file(), None, 0)
    everything = [p for part in PARTS for side in SIDES for p in contrast[part, side]]
    assert len(everything) == len(set(everything)) == 38
    assert len(contrast["selection", "target"]) == 6
    again, other = (read_contrast(class_file(), None, seed) for seed in (0, 1))
    assert again == contrast
    assert other["selection", "target"] != contrast["selection", "target"]


def test_file_can_be_used_for_one_part_only(class_file: Callable[..., Path], tmp_path: Path) -> None:
    """A file with `use` goes whole to that part; one under a non-commercial licence is refused."""
    (tmp_path / "more.json").write_text(json.dumps([f"DO IT {i}" for i in range(5)]))
    entry = {"path": "more.json", "licence": "MIT", "use": "selection"}
    inline = [f"BREAK {i}" for i in range(10)]
    contrast = read_contrast(class_file(target=[entry, *inline]), None, 0)
    assert {f"DO IT {i}" for i in range(5)} <= set(contrast["selection", "target"])
    assert not any(prompt.startswith("DO") for prompt in contrast["discovery", "target"])
    assert contrast.record[1]["licence"] == "MIT"
    path = class_file(target=[entry | {"licence": "CC BY-NC 4.0"}, *inline])
    with pytest.raises(DiscoveryError, match="CC BY-NC"):
        read_contrast(path, None, 0)


def test_pairs_file_of_search_is_read_as_a_contrast(tmp_path: Path) -> None:
    """The clean prompts of a pairs file are its targets, the corrupted ones its benign side."""
    path = tmp_path / "theft.jsonl"
    rows = [{"clean": f"steal {i}", "corrupted": f"buy {i}"} for i in range(10)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    contrast = read_contrast(path, None, 0)
    assert contrast.name == "theft"
    assert sorted(contrast["discovery", "target"] + contrast["selection", "target"]) == sorted(
        row["clean"] for row in rows
    )
    path.write_text(json.dumps({"clean": "steal"}))
    with pytest.raises(DiscoveryError, match="a contrast has two sides"):
        read_contrast(path, None, 0)


def test_subset_is_seeded_and_keeps_its_order() -> None:
    """The same seed chooses the same prompts, in their original order."""
    prompts = [f"{i:02d}" for i in range(30)]
    assert subset(prompts, 10, 3) == sorted(subset(prompts, 10, 3)) == subset(prompts, 10, 3)
    assert subset(prompts, 10, 3) != subset(prompts, 10, 4)
    assert subset(prompts, 99, 0) == prompts


def test_judges_read_whole_words_and_coherent_refusals() -> None:
    """Words count whole and in any case; a refusal must be coherent; only new failures count as damage."""
    words = Judged(kind="words", words=("ask a doctor",))
    assert shows(words, "Please ASK A DOCTOR.")
    assert not shows(words, "Please ask a doctorate.")
    refusal = Judged()
    assert shows(refusal, "I'm sorry, but I can't help with doses of medicines.")
    assert not shows(refusal, "I'm sorry sorry sorry sorry sorry sorry sorry sorry sorry sorry")
    assert fails("I'm sorry, but I can't help with that.", "Bread needs flour.", refusal)
    assert not fails("I'm sorry, but I can't help.", "I'm sorry, but I can't help.", refusal)
    assert fails("", "Bread needs flour.", refusal)


def _ends(shift: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = {side: torch.randn(80, 32, generator=generator) for side in SIDES}
    x["target"][:, 0] += shift
    return x


def test_probe_gates_open_on_the_shares_they_name() -> None:
    """A gate of rate r opens on about r of the benign prompts, looser gates on more target prompts."""
    gates, probe, area = probe_gates(2, _ends(6.0), _ends(6.0), "v.safetensors", "probe")
    assert area > 0.99
    loosest = gates[-1]
    negative = torch.cat([_ends(6.0)["benign"], _ends(6.0)["borderline"]])
    threshold = loosest.document["conditions"][0]["threshold"]
    assert float((probe.read(negative) > threshold).float().mean()) == pytest.approx(loosest.rate, abs=0.02)
    opened = [sum(gate.opens["target"]) for gate in gates]
    assert opened == sorted(opened)
    assert opened[-1] >= 79
    assert loosest.document["scope"] == "prompt_end"
    assert loosest.document["latched"]


def test_feature_gates_keep_their_rate_and_find_the_planted_feature(
    dictionary: Callable[..., Path],
) -> None:
    """With one feature planted in the target prompts the gates name it, and keep to their rate."""
    found = open_dictionary(dictionary() / "tiny-llama" / "tiny-2")
    row = torch.from_numpy(found.encoder_rows([7]).read[0])
    ends = _ends(0.0)
    ends["target"] += 3 * row / row.norm()
    gates = feature_gates(found, ends, ends)
    for gate in gates:
        assert sum(gate.opens["benign"]) + sum(gate.opens["borderline"]) <= gate.rate * 160
    ids = [condition["feature"] for condition in gates[-1].document["conditions"]]
    assert 7 in ids
    assert sum(gates[-1].opens["target"]) > 2 * sum(gates[-1].opens["benign"])


def test_features_below_their_threshold_count_as_zero(dictionary: Callable[..., Path]) -> None:
    """An activation below a feature's threshold counts as zero, above it as itself."""
    found = open_dictionary(dictionary() / "tiny-llama" / "tiny-2")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    rows = found.encoder_rows()
    u = x @ torch.from_numpy(rows.read).T + torch.from_numpy(rows.bias)
    torch.testing.assert_close(DictionaryFeatures(found.weights).encode(x), u * (u > 0.1))


def test_vectorised_auroc_equals_that_of_each_feature() -> None:
    """The vectorised AUROC agrees with the one that works on a single reading, ties included."""
    generator = torch.Generator().manual_seed(0)
    positive, negative = (torch.randn(n, 6, generator=generator).relu() for n in (9, 13))
    each = [auroc(positive[:, f], negative[:, f]) for f in range(6)]
    torch.testing.assert_close(feature_auroc(positive, negative), torch.tensor(each))


def test_features_that_rise_along_wanted_answers_come_first() -> None:
    """The feature that is active in wanted answers alone is ranked first; none rising is refused."""
    wanted, own = torch.zeros(6, 4), torch.zeros(6, 4)
    wanted[:, 2], own[:, 1] = 3.0, 5.0
    (first, *_) = rank_features(wanted, own)
    assert (first.id, first.auroc, first.level, first.difference) == (2, 1.0, 3.0, 3.0)
    with pytest.raises(DiscoveryError, match="no feature is more active"):
        rank_features(own, own)
    assert [feature.id for feature in rank_features(wanted, own, [0, 3])] == [0, 3]


def test_means_are_over_the_tokens_that_predict_the_answer(tiny: FrozenModel) -> None:
    """The span begins at the prompt's last token and ends before the answer's last one."""
    prompt, answer = tiny.chat_ids("hello"), tiny.text_ids("good day")
    tokens, mask = tiny.pad([[*prompt, *answer]])
    x = tiny.residuals(tokens, mask, [2])[2][0].float()
    span = x[len(prompt) - 1 : len(prompt) + len(answer) - 1]
    found = answer_means(tiny, [prompt], [answer], [2])[2][0]
    torch.testing.assert_close(found, span.mean(0), rtol=1e-4, atol=1e-4)


def _point(efficacy: float, keeps: bool, damage: float = 0.0, effort: float = 1.0) -> Point:
    return Point({}, 0.1, efficacy, damage, 0.0, {}, keeps, effort)


def test_best_point_is_the_most_effective_within_the_budgets() -> None:
    """Budgets come first, then efficacy, damage, and effort; a point without effect is never best."""
    within, gentle = _point(0.8, True, effort=2.0), _point(0.8, True, effort=1.0)
    assert best([_point(0.9, False), within, gentle, _point(0.8, True, damage=0.01)]) is gentle
    assert best([_point(0.9, False), _point(0.0, True)]) is None
    assert Action({}, [], 1.0).effort == 1.0


def _circuit(tmp_path: Path, spec: ModelSpec, **values: object) -> Path:
    faithfulness: list[object] = []
    content = {
        "target_class": "t",
        "model": spec.name,
        "fingerprint": spec.fingerprint,
        "metric": "logit_diff",
        "method": {"steps": 5, "wanted_edges": 3, "edges_of_model": 9, "nodes_of_model": 6},
        "data": [{"name": "p", "sha256": "0" * 64, "discovery_pairs": 1, "evaluation_pairs": 1}],
        "seeds": [0],
        "nodes": NODES,
        "edges": [
            {"source": "input", "target": "m2", "score": 1.0},
            {"source": "m2", "target": "logits", "score": 1.0},
        ],
        "faithfulness": faithfulness,
        "stability": {
            "resamples_per_seed": 1,
            "circuits": 2,
            "edge_jaccard": 1.0,
            "edge_chance": 0.1,
            "node_jaccard": 1.0,
            "node_chance": 0.1,
        },
        "run": {},
    }
    path = tmp_path / "circuit.json"
    path.write_text(json.dumps(content | values))
    return path


def test_circuit_gives_the_layers_that_contribute_most(tmp_path: Path, tiny: FrozenModel) -> None:
    """Layers come from the nodes by their causal contribution; another model's circuit is refused."""
    path = _circuit(tmp_path, tiny.spec)
    origin = from_circuit(path, tiny.spec)
    assert origin.layers == (1, 2)
    assert origin.of_policy == {"origin": {"circuit": path.name, "sha256": sha256_of_file(path)}}
    known = from_circuit(_circuit(tmp_path, tiny.spec, id=CIRCUIT_ID), tiny.spec).of_policy["origin"]
    assert Origin.model_validate(known).id == CIRCUIT_ID
    assert from_features("3, 4").of_policy == {}
    assert origin.features is None
    with pytest.raises(DiscoveryError, match=tiny.spec.fingerprint[:12]):
        from_circuit(_circuit(tmp_path, tiny.spec, fingerprint="cd" * 32), tiny.spec)
    ends = [NODES[0], NODES[3]]
    edge = [{"source": "input", "target": "logits", "score": 1.0}]
    with pytest.raises(DiscoveryError, match="names no head, MLP or feature"):
        from_circuit(_circuit(tmp_path, tiny.spec, nodes=ends, edges=edge), tiny.spec)


@pytest.mark.parametrize(
    ("name", "content"),
    [("f.txt", "12, 40\n12"), ("f.json", "[12, 40]"), ("f.yaml", "features: [12, 40]")],
)
def test_features_are_read_from_text_json_and_yaml(tmp_path: Path, name: str, content: str) -> None:
    """Ids are read once, in order; they can also be given on the command line."""
    (tmp_path / name).write_text(content)
    assert from_features(str(tmp_path / name)).features_at(15) == (12, 40)
    assert from_features("12, 40").features_at(15) == (12, 40)


@pytest.mark.parametrize(
    ("name", "content"),
    [("f.txt", "twelve"), ("f.json", "[1.5]"), ("f.json", "{"), ("f.yaml", "features: []")],
)
def test_list_without_feature_ids_is_refused(tmp_path: Path, name: str, content: str) -> None:
    """A file that is not a list of ids is named with the remedy."""
    (tmp_path / name).write_text(content)
    with pytest.raises(DiscoveryError, match=name):
        from_features(str(tmp_path / name))
    with pytest.raises(DiscoveryError, match="neither ids separated by commas"):
        from_features(str(tmp_path / "gone.txt"))
