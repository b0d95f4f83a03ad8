"""`mechctl circuits`, and the lines of `report` and `serve-ui` that have to wait for the control plane."""

import sys
from pathlib import Path

import pytest
import yaml

from interpretops.circuit import Circuit
from interpretops.circuit.store import CircuitStore
from interpretops.ids import new_id
from mechctl.main import main

Run = tuple[int, str, str]


@pytest.fixture
def mechctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs `mechctl` in this process with a state folder of its own; gives exit status, stdout, stderr."""
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"paths": {"state": str(tmp_path / "state")}}))

    def run(*arguments: str) -> Run:
        monkeypatch.setattr(sys, "argv", ["mechctl", *arguments, "--config", str(config)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def circuit(identifier: str, target_class: str) -> Circuit:
    """A circuit of two nodes."""
    return Circuit.model_validate(
        {
            "id": identifier,
            "target_class": target_class,
            "model": "tiny",
            "fingerprint": "ab" * 32,
            "metric": "logit_diff",
            "method": {"steps": 5, "wanted_edges": 1, "edges_of_model": 7, "nodes_of_model": 4},
            "data": ({"name": "p", "sha256": "cd" * 32, "discovery_pairs": 1, "evaluation_pairs": 1},),
            "seeds": (0,),
            "nodes": (
                {"id": "input", "kind": "input", "score": 1.0},
                {"id": "logits", "kind": "logits", "score": 1.0},
            ),
            "edges": ({"source": "input", "target": "logits", "score": 0.9},),
            "faithfulness": (),
            "stability": {
                "resamples_per_seed": 1,
                "circuits": 1,
                "edge_jaccard": 1.0,
                "edge_chance": 0.5,
                "node_jaccard": 1.0,
                "node_chance": 0.5,
            },
            "run": {},
        }
    )


@pytest.fixture
def ids(tmp_path: Path) -> list[str]:
    """Three circuits in the store, oldest first: jailbreak, toxicity, jailbreak."""
    store = CircuitStore(tmp_path / "state" / "circuits")
    made = [new_id("cx", now_ms=1_800_000_000_000 + number) for number in range(3)]
    for identifier, target_class in zip(made, ("jailbreak", "toxicity", "jailbreak"), strict=True):
        store.add(circuit(identifier, target_class))
    return made


def test_circuits_are_listed_newest_first(mechctl, ids: list[str]) -> None:  # type: ignore[no-untyped-def]
    """Each with its time, class, model and size."""
    status, out, _ = mechctl("circuits")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ids[::-1]
    assert "2027-01-15 08:00 UTC  jailbreak in tiny: 2 nodes, 1 edges" in out


def test_latest_id_is_printed_alone_for_scripts(mechctl, ids: list[str]) -> None:  # type: ignore[no-untyped-def]
    """`--latest --id-only` prints one id and nothing else; `--class` chooses among all."""
    assert mechctl("circuits", "--latest", "--id-only")[:2] == (0, ids[2] + "\n")
    assert mechctl("circuits", "--latest", "--id-only", "--class", "toxicity")[:2] == (0, ids[1] + "\n")


def test_empty_store_is_one_line_with_the_remedy(mechctl) -> None:  # type: ignore[no-untyped-def]
    """Before the first search, the line names `mechctl search`, and nothing goes to stdout."""
    status, out, errors = mechctl("circuits", "--latest", "--id-only")
    assert (status, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert "mechctl search" in errors


@pytest.mark.parametrize("line", ["report", "serve-ui"])
def test_commands_of_the_missing_control_plane_say_so(mechctl, ids: list[str], line: str) -> None:  # type: ignore[no-untyped-def]
    """A circuit's report and the dashboard end in one clear line and a status that stops a script."""
    more = ("--circuit-id", ids[0], "--out", "report.pdf") if line == "report" else ()
    status, out, errors = mechctl(line, *more)
    assert (status, out) == (2, "")
    assert len(errors.splitlines()) == 1
    assert "control plane" in errors
    assert not Path("report.pdf").exists()


@pytest.mark.parametrize("identifier", ["cx_01JD8M0T5WABCDEFGHJKMNPQRS", "../../etc/passwd", ""])
def test_report_of_an_unknown_circuit_names_it(mechctl, ids: list[str], identifier: str) -> None:  # type: ignore[no-untyped-def]
    """An unknown id and a malformed one are refused before anything else."""
    status, _, errors = mechctl("report", "--circuit-id", identifier)
    assert status == 2
    assert "mechctl circuits" in errors
    assert "control plane" not in errors
