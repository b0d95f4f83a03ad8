"""The circuit file: what is saved is what is loaded, and what does not hold together is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from interpretops.circuit import Circuit, CircuitError, load_circuit


def document() -> dict[str, Any]:
    """A small, whole circuit as JSON."""
    return {
        "target_class": "copying",
        "model": "tiny",
        "fingerprint": "ab" * 32,
        "metric": "logit_diff",
        "method": {"steps": 5, "wanted_edges": 2, "edges_of_model": 7, "nodes_of_model": 4},
        "data": [{"name": "p.jsonl", "sha256": "cd" * 32, "discovery_pairs": 3, "evaluation_pairs": 3}],
        "seeds": [0, 1],
        "nodes": [
            {"id": "input", "kind": "input", "score": 1.0},
            {"id": "a0.h1", "kind": "head", "layer": 0, "head": 1, "score": 0.9, "ccs": 0.8},
            {"id": "logits", "kind": "logits", "score": 1.0},
        ],
        "edges": [
            {"source": "input", "target": "a0.h1", "score": 0.9},
            {"source": "a0.h1", "target": "logits", "score": 0.9},
        ],
        "faithfulness": [],
        "stability": {
            "resamples_per_seed": 2,
            "circuits": 4,
            "edge_jaccard": 1.0,
            "edge_chance": 0.2,
            "node_jaccard": 1.0,
            "node_chance": 0.3,
        },
        "run": {"commit": "unknown"},
    }


def with_features() -> dict[str, Any]:
    """The same circuit with two features of a dictionary and its error."""
    named = {"kind": "feature", "layer": 2, "dictionary": "words"}
    return document() | {
        "format": 2,
        "nodes": [
            *document()["nodes"],
            named | {"id": "f2.7", "feature": 7, "score": 0.2, "ccs": 0.1},
            named | {"id": "f2.9", "feature": 9, "score": 0.1, "ccs": -0.4},
            named | {"id": "e2", "kind": "error", "score": 0.3, "ccs": 0.5},
        ],
        "dictionaries": [
            {
                "id": "words",
                "layer": 2,
                "width": 16,
                "weights_sha256": "ef" * 32,
                "active": 4,
                "score_features": 0.4,
                "score_error": 0.3,
                "ccs_all": 0.5,
                "ccs_named": 0.3,
                "random_sets": 20,
                "ccs_random_mean": 0.1,
                "ccs_random_best": 0.2,
                "jaccard": 0.9,
                "chance": 0.5,
            }
        ],
    }


def load(content: dict[str, Any], folder: Path) -> Circuit:
    (folder / "circuit.json").write_text(json.dumps(content))
    return load_circuit(folder / "circuit.json")


def test_features_and_components_are_told_apart(tmp_path: Path) -> None:
    """Heads and MLPs are components; features come by their dictionary, the strongest first."""
    circuit = load(with_features(), tmp_path)
    assert [node.id for node in circuit.components()] == ["a0.h1"]
    assert [node.feature for node in circuit.features()] == [9, 7]
    assert circuit.features("words") == circuit.features()
    assert circuit.features("others") == ()


def test_file_of_the_first_format_still_loads(tmp_path: Path) -> None:
    """Format 1 knew no dictionaries: such a file loads, and one that names them is refused."""
    assert load(document() | {"format": 1}, tmp_path).dictionaries == ()
    with pytest.raises(CircuitError, match="names dictionaries, which format 1 does not have"):
        load(with_features() | {"format": 1}, tmp_path)


def test_file_of_a_later_format_is_refused(tmp_path: Path) -> None:
    """What this version cannot know is not guessed: one line names the format and the remedy."""
    with pytest.raises(CircuitError, match="format = 4, but this version reads 1 to 3; update") as error:
        load(document() | {"format": 4}, tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("node", "change", "expected"),
    [
        (3, {"id": "f2.8"}, "kind, layer and head make 'f2.7'"),
        (3, {"dictionary": None}, "only a feature or an error names one"),
        (3, {"dictionary": "gone"}, "no dictionary 'gone' at that layer"),
        (1, {"dictionary": "words"}, "only a feature or an error names one"),
    ],
)
def test_feature_that_fits_no_dictionary_is_named(
    tmp_path: Path, node: int, change: dict[str, Any], expected: str
) -> None:
    """A feature node agrees with its name and with a dictionary of the file."""
    content = with_features()
    content["nodes"][node] |= change
    with pytest.raises(CircuitError, match=re.escape(expected)):
        load(content, tmp_path)


def test_no_edge_joins_features(tmp_path: Path) -> None:
    """Edges are between components."""
    content = with_features()
    content["edges"].append({"source": "f2.7", "target": "logits", "score": 0.1})
    with pytest.raises(CircuitError, match=r"no node 'f2\.7'"):
        load(content, tmp_path)


def test_saved_circuit_is_loaded_equal(tmp_path: Path) -> None:
    """Save and load give an equal circuit, and the same bytes again."""
    circuit = Circuit.model_validate_json(json.dumps(document()))
    circuit.save(tmp_path / "a.json")
    again = load_circuit(tmp_path / "a.json")
    assert again == circuit
    again.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("colour",), "red", "colour: Extra inputs"),
        (("metric",), "kl", "metric: Input should be"),
        (("fingerprint",), "ab", "fingerprint"),
        (("nodes", 1, "head"), 0, "kind, layer and head make 'a0.h0'"),
        (("nodes", 1, "score"), float("nan"), "nodes.1.score"),
        (("nodes", 1, "score"), "1", "nodes.1.score"),
        (("edges", 0, "target"), "a0.h2", "no node 'a0.h2'"),
        (("edges", 1), {"source": "input", "target": "a0.h1", "score": 0.9}, "names input->a0.h1 twice"),
        (("stability", "edge_jaccard"), 1.2, "stability.edge_jaccard"),
        (("seeds",), [], "seeds"),
    ],
)
def test_what_does_not_hold_together_is_named(
    tmp_path: Path, path: tuple[str | int, ...], value: object, expected: str
) -> None:
    """A wrong key, type, range or reference is one line with file and field."""
    changed = document()
    place: Any = changed
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    file = tmp_path / "circuit.json"
    file.write_text(json.dumps(changed))
    with pytest.raises(CircuitError) as error:
        load_circuit(file)
    assert len(str(error.value).splitlines()) == 1
    assert str(file) in str(error.value)
    assert expected in str(error.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is not there is one line."""
    with pytest.raises(CircuitError, match=r"gone\.json: cannot be read"):
        load_circuit(tmp_path / "gone.json")


def test_only_the_third_format_has_an_id(tmp_path: Path) -> None:
    """The id is read back as it stands; an older format, or an id of another kind, is refused by name."""
    named = document() | {"format": 3, "id": "cx_01JD8M0T5WABCDEFGHJKMNPQRS"}
    assert load(named, tmp_path).id == named["id"]
    with pytest.raises(CircuitError, match="has an id, which format 2 does not have"):
        load(named | {"format": 2}, tmp_path)
    with pytest.raises(CircuitError, match="id: "):
        load(named | {"id": "run_01JD8M0T5WABCDEFGHJKMNPQRS"}, tmp_path)
