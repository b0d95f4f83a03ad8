"""The circuit file: what is saved is what is loaded, and what does not hold together is refused by name."""

import json
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
