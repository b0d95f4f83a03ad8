"""`mechctl search` as a user types it: the known circuit in a file, stop and resume, faults in one line."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from discovery import frozen_model
from discovery.circuits import search as search_module
from discovery.frozen_model import FrozenModel
from discovery.jobs import whole_file
from interpretops.circuit import load_circuit
from interpretops.files.atomic_file import write_atomically

CIRCUIT = {("input", "a0.h1"), ("a0.h1", "a2.h0"), ("a2.h0", "logits")}


def test_known_circuit_is_written_with_its_measures(mechctl, pairs_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Three edges are asked for, and the file holds the right ones, faithful and stable."""
    out = tmp_path / "circuit.json"
    status, text, _ = mechctl(
        "--pairs", pairs_file, "--class", "copying", "--edges", 3, "--out", out, "--work", tmp_path / "work"
    )
    assert status == 0
    assert "faithfulness" in text
    circuit = load_circuit(out)
    assert {(edge.source, edge.target) for edge in circuit.edges} == CIRCUIT
    assert circuit.target_class == "copying"
    assert circuit.data[0].discovery_pairs == circuit.data[0].evaluation_pairs == 6
    ccs = {node.id: node.ccs for node in circuit.nodes}
    assert ccs == {
        "input": None,
        "logits": None,
        "a0.h1": pytest.approx(1, abs=0.1),
        "a2.h0": pytest.approx(1, abs=0.1),
    }
    for found in circuit.faithfulness:
        assert found.faithfulness == pytest.approx(1, abs=0.1)
        assert found.random is not None
        assert found.random.count == 20
        assert found.random.cmd_mean > found.cmd
        assert found.random.cpr_mean < found.cpr
    assert circuit.stability.circuits == 20
    assert circuit.stability.edge_jaccard == circuit.stability.node_jaccard == 1
    assert circuit.stability.edge_chance < 0.1
    assert circuit.stability.paraphrases == 2
    assert circuit.stability.paraphrase_edge_jaccard == 1
    assert circuit.run["job"] == "search"
    assert str(tmp_path) not in out.read_text()


def test_stopped_run_goes_on_and_ends_the_same(  # type: ignore[no-untyped-def]
    mechctl, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped amid attribution, the rest alone is computed, and the file is that of an unbroken run but for
    the id; once finished, the same command ends in the same file, id included."""
    calls = []
    real = search_module.edge_scores  # type: ignore[attr-defined]

    def stopping(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(search_module, "edge_scores", stopping)
    common = ("--pairs", pairs_file, "--edges", 5, "--batch", 2)
    assert mechctl(*common, "--out", tmp_path / "a.json", "--work", tmp_path / "work")[0] == 2
    assert not (tmp_path / "a.json").exists()
    before = len(calls)
    assert mechctl(*common, "--out", tmp_path / "a.json", "--work", tmp_path / "work")[0] == 0
    resumed = len(calls) - before
    assert mechctl(*common, "--out", tmp_path / "b.json", "--work", tmp_path / "other")[0] == 0
    assert len(calls) - before - resumed == resumed + 1
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert first.pop("id") != second.pop("id")
    assert first == second
    whole = (tmp_path / "a.json").read_text()
    assert mechctl(*common, "--out", tmp_path / "a.json", "--work", tmp_path / "work")[0] == 0
    assert (tmp_path / "a.json").read_text() == whole


def test_search_runs_in_float32_whatever_the_serving_dtype(  # type: ignore[no-untyped-def]
    mechctl, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Search ignores `model.dtype`, the engine's: in bfloat16, rounding would hide small effects."""
    seen = []
    real = frozen_model.FrozenModel

    def noting(folder: Path, dtype: torch.dtype, device: str) -> FrozenModel:
        seen.append(dtype)
        return real(folder, dtype, device)

    monkeypatch.setattr(frozen_model, "FrozenModel", noting)
    words = ("--pairs", pairs_file, "--edges", 3, "--out", tmp_path / "c.json", "--work", tmp_path / "work")
    assert mechctl(*words)[0] == 0
    assert seen == [torch.float32]


def row(**changes: object) -> str:
    return json.dumps(
        {"clean": "w1 w0 w15", "corrupted": "w8 w0 w15", "answer": "w1", "wrong": "w8"} | changes
    )


@pytest.mark.parametrize(
    ("content", "arguments", "expected"),
    [
        ("", (), "holds no pairs"),
        ("{", (), "not valid JSONL"),
        (row(corrupted=""), (), "row 1: corrupted = '', but a contrast has two sides"),
        (row(corrupted="w1 w0 w15"), (), "are the same"),
        (row(corrupted="w8 w0"), (), "clean has 3 tokens and corrupted 2"),
        (row(answer="w8"), (), "leave one side without a first token of its own"),
        (row(answer=""), (), "row 1: answer = ''"),
        (row(), (), "both need at least one"),
        (f"{row(topic='a')}\n{row(topic='a')}", (), "leave 0 to find the circuit and 2 to measure it"),
        (row(corrupted="w8"), ("--skip-unfit",), "no pair is left (1 skipped)"),
        (f"{row()}\n{row()}", ("--edges", 100), "edges = 100, but known-circuit has 82 edges"),
        (f"{row()}\n{row()}", ("--steps", 3), "--steps = 3, but must be at least 5"),
        (
            f"{row()}\n{row()}",
            ("--metric", "kl"),
            "--metric = 'kl', but must be one of logit_diff",
        ),
        (f"{row()}\n{row()}", ("--class", " "), "--class is empty"),
        (f"{row()}\n{row()}", ("--held-out", 1.5), "--held-out = 1.5, but must be less than 1"),
        (f"{row()}\n{row()}", ("--limit", 1), "--limit = 1, but must be at least 2"),
        (
            f"{row()}\n{row()}",
            ("--layout", "x"),
            "--layout = 'x', but must be one of pairs, ioi",
        ),
        (f"{row()}\n{row()}", ("--layout", "ioi"), "IOI needs one name once and one twice"),
        (f"{row()}\n{row()}", ("--layout", "greater-than"), "label = None"),
        (f"{row()}\n{row()}", ("--edges", 2), "too few to lead from the input to the logits"),
    ],
)
def test_fault_is_one_line(  # type: ignore[no-untyped-def]
    mechctl, tmp_path: Path, content: str, arguments: tuple[object, ...], expected: str
) -> None:
    """Pairs or options that cannot be used end in exit status 2 and one line that names the fault."""
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    out = tmp_path / "c.json"
    status, _, lines = mechctl("--pairs", path, "--out", out, "--work", tmp_path / "work", *arguments)
    lines = [line for line in lines if not line.startswith("search: ")]
    assert status == 2
    assert len(lines) == 1, lines
    assert expected in lines[0]
    assert not out.exists()


def test_missing_file_is_named(mechctl, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A file that is not there ends in one line."""
    status, _, lines = mechctl("--pairs", tmp_path / "gone.csv", "--out", tmp_path / "c.json")
    assert (status, len(lines)) == (2, 1)
    assert "gone.csv: cannot be read" in lines[0]


def test_full_disk_leaves_what_was_done(  # type: ignore[no-untyped-def]
    mechctl, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that cannot be written ends in one line; those before it stay."""

    def full(path: Path, data: bytes) -> None:
        if "0001" in path.name:
            raise OSError(28, "No space left on device")
        write_atomically(path, data)

    monkeypatch.setattr(whole_file, "write_atomically", full)
    status, _, lines = mechctl(
        "--pairs", pairs_file, "--edges", 3, "--out", tmp_path / "c.json", "--work", tmp_path / "work"
    )
    assert status == 2
    assert "No space left on device" in lines[-1]
    assert [path.name for path in (tmp_path / "work").rglob("*.safetensors")] == ["scores-0000.safetensors"]


def test_damaged_step_is_named(mechctl, pairs_file: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A step's file that is damaged is named with the remedy, and is not taken for a result."""
    words = ("--pairs", pairs_file, "--edges", 3, "--out", tmp_path / "c.json", "--work", tmp_path / "work")
    assert mechctl(*words)[0] == 0
    for pattern, content in (("contributions.json", "[1, "), ("scores-0000.safetensors", "junk")):
        path = next((tmp_path / "work").rglob(pattern))
        path.write_text(content)
        status, _, lines = mechctl(*words)
        assert status == 2
        assert f"{path}: is not a finished step" in lines[-1]


def test_terminated_run_is_one_line_and_keeps_its_steps(  # type: ignore[no-untyped-def]
    mechctl, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle ends in one line that names the folder of finished steps."""

    def terminate(path: Path, data: bytes) -> None:
        if "0001" in path.name:
            os.kill(os.getpid(), signal.SIGTERM)
        write_atomically(path, data)

    monkeypatch.setattr(whole_file, "write_atomically", terminate)
    status, _, lines = mechctl(
        "--pairs", pairs_file, "--edges", 3, "--out", tmp_path / "c.json", "--work", tmp_path / "work"
    )
    assert status == 2
    assert "stopped by SIGTERM: finished steps are in" in lines[-1]
    assert [path.name for path in (tmp_path / "work").rglob("*.safetensors")] == ["scores-0000.safetensors"]
