"""Features as nodes: known ones carry the contrast, scores are complete, effects are the engine's edit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from discovery.circuits import feature_search
from discovery.circuits.decoder import GraphDecoder
from discovery.circuits.features import FeatureSite, feature_effects, feature_scores
from discovery.circuits.metric import measure
from discovery.circuits.pairs import Pair
from interpretops.artifacts import Artifacts
from interpretops.circuit import load_circuit


@pytest.fixture
def words(known: GraphDecoder, artifacts: Path) -> FeatureSite:
    """The dictionary of copied words, in the model that copies them."""
    return FeatureSite(known, Artifacts(artifacts, known.model.spec).named_dictionary("words"))


def hooked(site: FeatureSite, pair: Pair, feature: int) -> float:
    """The feature's effect by a hook on the plain model: M(x) - M(x + (a' - a) . decoder row)."""
    model = site.decoder.model
    tokens = torch.tensor([pair.clean, pair.corrupted])
    mask = torch.ones_like(tokens)
    x = model.residuals(tokens, mask, [site.manifest.layer])[site.manifest.layer]
    a = site.activations(x)[..., feature]
    with torch.no_grad():
        whole = model.network(input_ids=tokens[:1]).logits[:, -1]
        edit = (a[1] - a[0])[:, None] * site.write[feature]
        with model.edited({site.manifest.layer: lambda stream: stream + edit}):
            edited = model.network(input_ids=tokens[:1]).logits[:, -1]
    before, after = (float(measure("logit_diff", logits, [pair])) for logits in (whole, edited))
    return before - after


def test_two_features_carry_a_pair(words: FeatureSite, pairs: list[Pair]) -> None:
    """Of twenty features the ones of the two exchanged words have all the score, one for and one against."""
    scores = feature_scores(words, pairs[:1], "logit_diff", 5)[0]
    right, wrong = pairs[0].answers[0], pairs[0].wrong[0]
    assert set(scores[:-1].abs().argsort(descending=True)[:2].tolist()) == {right, wrong}
    assert float(scores[right] + scores[wrong]) == pytest.approx(float(scores.sum()), rel=0.1)
    assert float(scores[-1].abs()) < 0.1 * float(scores.sum())


@pytest.mark.parametrize("steps", [5, 40])
def test_features_and_error_sum_to_the_contrast(
    noisy: GraphDecoder, artifacts: Path, pairs: list[Pair], steps: int
) -> None:
    """Completeness, where features miss much of the stream: with the error node nothing is lost."""
    dictionary = Artifacts(artifacts, noisy.model.spec).all_dictionaries
    opened = Artifacts(artifacts, noisy.model.spec)._open(next(f for f in dictionary if f.name == "late"))
    site = FeatureSite(noisy, opened)
    scores = feature_scores(site, pairs[:1], "logit_diff", steps)[0]
    tokens = torch.tensor([pairs[0].clean, pairs[0].corrupted])
    logits = noisy.network(input_ids=tokens).logits[:, -1]
    clean, corrupted = measure("logit_diff", logits, [pairs[0]] * 2).tolist()
    tolerance = 0.1 if steps == 5 else 0.01
    assert float(scores.sum()) == pytest.approx(clean - corrupted, rel=tolerance)
    assert float(scores[-1].abs()) > 0.01 * abs(clean - corrupted)


def test_exact_effect_is_that_of_a_hook(words: FeatureSite, pairs: list[Pair]) -> None:
    """A feature's effect is what the same edit does to Hugging Face's own forward pass."""
    pair = pairs[1]
    named = [pair.answers[0], pair.wrong[0], 15, 17]
    effects = feature_effects(words, [pair], "logit_diff", [[feature] for feature in named])[0]
    expected = [hooked(words, pair, feature) for feature in named]
    np.testing.assert_allclose(effects[:4].numpy(), expected, atol=1e-5)
    assert effects[0] > 0.2 < effects[1]
    assert effects[3] == 0


def test_sinks_have_no_features(words: FeatureSite, pairs: list[Pair]) -> None:
    """Tokens above the norm bound are not edited, as in the engine: the error carries what they carry."""
    words.max_norm = 0.0
    effects = feature_effects(words, pairs[:1], "logit_diff", [[pairs[0].answers[0]]])[0]
    assert effects[:2].tolist() == [0, 0]
    assert float(effects[2]) > 1


def test_topk_keeps_the_strongest_alone(words: FeatureSite) -> None:
    """A TopK dictionary's feature is active only among the k strongest of its token."""
    x = torch.zeros(1, words.features.read.shape[1])
    x[0, 16 + 3], x[0, 16 + 5], x[0, 16 + 6] = 1.0, 3.0, 2.0
    assert words.activations(x).nonzero()[:, 1].tolist() == [3, 5, 6]
    words.features.k = 2
    assert words.activations(x).nonzero()[:, 1].tolist() == [5, 6]


def test_search_names_features_beside_components(  # type: ignore[no-untyped-def]
    mechctl, pairs_file: Path, artifacts: Path, tmp_path: Path
) -> None:
    """`--dictionary` adds nodes with exact contributions, an error node and a record; the circuit stays."""
    out, work = tmp_path / "circuit.json", tmp_path / "work"
    common = ("--pairs", pairs_file, "--edges", 3, "--work", work, "--artifacts", artifacts)
    assert mechctl(*common, "--out", tmp_path / "plain.json")[0] == 0
    words = ("--dictionary", "words", "--dictionary", "late", "--features", 14)
    status, text, _ = mechctl(*common, *words, "--out", out)
    assert status == 0
    assert "words: 1" in text
    circuit, plain = load_circuit(out), load_circuit(tmp_path / "plain.json")
    assert circuit.edges == plain.edges
    assert circuit.components() == plain.components()
    assert [node.id for node in circuit.components()] in (["a0.h1", "a2.h0"], ["a2.h0", "a0.h1"])
    assert plain.features() == ()
    record = circuit.dictionaries[0]
    assert (record.id, record.layer, record.width) == ("words", 0, 20)
    assert record.ccs_all == pytest.approx(1, abs=0.1)
    assert 0.1 < record.ccs_named < record.ccs_all + 0.1  # the measured pairs exchange other words too
    assert record.random_sets == 20
    named = circuit.features("words")
    assert {node.id for node in named} <= {f"f0.{word}" for word in range(16)}
    assert [abs(node.ccs or 0) for node in named] == sorted((abs(n.ccs or 0) for n in named), reverse=True)
    assert len(circuit.features()) == len(named) + len(circuit.features("late"))
    assert {node.id for node in circuit.nodes if node.kind == "error"} == {"e0", "e1"}
    assert 0 <= record.chance <= record.jaccard <= 1


def test_features_go_on_where_they_stopped(  # type: ignore[no-untyped-def]
    mechctl, pairs_file: Path, artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that were finished before an interruption are read, and the file is that of an unbroken run."""
    calls = []
    real: Any = feature_search.feature_scores  # type: ignore[attr-defined]

    def stopping(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(feature_search, "feature_scores", stopping)
    inputs = ("--pairs", pairs_file, "--artifacts", artifacts, "--dictionary", "words")
    common = (*inputs, "--edges", 3, "--batch", 2)
    assert mechctl(*common, "--out", tmp_path / "a.json", "--work", tmp_path / "work")[0] == 2
    assert mechctl(*common, "--out", tmp_path / "a.json", "--work", tmp_path / "work")[0] == 0
    resumed = len(calls) - 2
    assert mechctl(*common, "--out", tmp_path / "b.json", "--work", tmp_path / "other")[0] == 0
    assert len(calls) - 2 - resumed == resumed + 1
    resumed_circuit, unbroken_circuit = (
        json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json")
    )
    assert resumed_circuit.pop("id") != unbroken_circuit.pop("id")
    assert resumed_circuit == unbroken_circuit


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--dictionary", "gone"), "--dictionary gone: there is no such dictionary"),
        (("--dictionary", "heads"), "dictionary heads: point = attn_z, but features are searched"),
        (("--dictionary", "words", "--features", 0), "--features = 0, but must be at least 1"),
    ],
)
def test_unfit_dictionary_is_one_line(  # type: ignore[no-untyped-def]
    mechctl, pairs_file: Path, artifacts: Path, tmp_path: Path, arguments: tuple[object, ...], expected: str
) -> None:
    """A dictionary that is not there or reads elsewhere ends in one line, before anything is computed."""
    out, work = tmp_path / "c.json", tmp_path / "work"
    words = ("--pairs", pairs_file, "--edges", 3, "--out", out, "--work", work, "--artifacts", artifacts)
    status, _, lines = mechctl(*words, *arguments)
    assert (status, len(lines)) == (2, 1), lines
    assert expected in lines[0]
    assert not work.exists()
