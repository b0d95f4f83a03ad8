"""`mechctl propose` on a tiny model: what it writes, how it resumes, and that faults are one line."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from discovery.frozen_model import FrozenModel
from discovery.gates.contrast import read_contrast
from discovery.jobs import checksummed_file as sealed
from discovery.jobs import whole_file
from interpretops.compile import compile_policy
from interpretops.policy import load_policy

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--answer-tokens", 6, "--pairs", 4)


def _lines(errors: str) -> list[str]:
    noise = ("Loading", "propose:", "fit-gate", "Warning")
    return [line for line in errors.splitlines() if line.strip() and not line.startswith(noise)]


@pytest.mark.parametrize("method", ["direction", "sae-feature"])
def test_proposal_compiles_and_records_every_point(
    mechctl: Run,
    class_file: Callable[..., Path],
    dictionary: Callable[..., Path],
    tiny: FrozenModel,
    tmp_path: Path,
    method: str,
) -> None:
    """Either a policy that compiles is written with its record, or no point keeps the budgets."""
    # A random model answers in arbitrary letters: what is wanted here is any of them.
    path = class_file(judge={"kind": "words", "words": list("abcdefghijklmnopqrstuvwxyz0123456789!?.,")})
    out = tmp_path / "policies" / "shout.yaml"
    arguments = ("propose", "--contrast", path, "--method", method, "--out", out, "--policy-id", "shout")
    wide = ("--benign-budget", 1, "--borderline-budget", 1, "--model", tiny.folder)
    status, text, errors = mechctl(*arguments, *wide, *SMALL, "--artifacts", dictionary())
    record = json.loads((tmp_path / "policies" / "records" / "shout.json").read_text())
    assert record["curve"]
    assert record["data"][0]["path"] == "shouting.yaml"
    assert {"commit", "seed", "versions", "model"} <= set(record)
    assert {"efficacy", "damage", "over_reach", "keeps_budgets"} <= set(record["curve"][0])
    if status:
        assert record["chosen"] is None
        assert len(_lines(errors)) == 1
        return
    plan = compile_policy(load_policy(out), model=tiny.spec, artifacts=tmp_path / "artifacts")
    assert plan.revision == record["revision"]
    assert all((edits.units.gate == 1).all() for edits in plan.edits.values())
    assert [gate.scope for gate in plan.gates[1:]] == ["prompt_end"]
    assert record["chosen"] in record["curve"]
    assert "chosen:" in text
    assert out.read_text().startswith("# Made by `mechctl propose")


def _arguments(path: Path, tiny: FrozenModel, tmp_path: Path, *more: object) -> tuple[object, ...]:
    fixed = ("propose", "--contrast", path, "--model", tiny.folder, "--artifacts", tmp_path / "artifacts")
    return (*fixed, "--work", tmp_path / "work", "--layers", 2, "--strengths", "1,4", *SMALL, *more)


def test_second_run_reuses_the_finished_steps_of_the_first(
    mechctl: Run,
    class_file: Callable[..., Path],
    tiny: FrozenModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that dies at a grid point keeps the finished points; the next run computes only the rest."""
    arguments = _arguments(class_file(), tiny, tmp_path, "--policy-id", "shout")
    real = sealed.write_whole  # type: ignore[attr-defined]
    written: list[str] = []

    def dies_at_the_second_point(path: Path, data: bytes) -> None:
        if "points" in path.parts and any("points" in name for name in written):
            raise KeyboardInterrupt
        written.append(str(path))
        real(path, data)

    monkeypatch.setattr(sealed, "write_whole", dies_at_the_second_point)
    assert mechctl(*arguments)[0] == 2
    points = tmp_path / "work" / "points"
    (first,) = points.glob("*.json")
    began = first.stat().st_mtime_ns
    monkeypatch.setattr(sealed, "write_whole", real)
    mechctl(*arguments)
    assert len(list(points.glob("*.json"))) == 2
    assert first.stat().st_mtime_ns == began
    record = json.loads((tmp_path / "work" / "records" / "shout.json").read_text())
    assert {point["action"]["strength"] for point in record["curve"]} == {1.0, 4.0}


def test_full_disk_is_one_line_and_the_next_run_resumes(
    mechctl: Run,
    class_file: Callable[..., Path],
    tiny: FrozenModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk is one line that names the file; the next run reads the finished steps."""
    arguments = _arguments(class_file(), tiny, tmp_path)
    real = whole_file.write_atomically  # type: ignore[attr-defined]

    def full(path: Path, data: bytes) -> None:
        if "points" in path.parts:
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(whole_file, "write_atomically", full)
    status, _, errors = mechctl(*arguments)
    (line,) = _lines(errors)
    assert status == 2
    assert "No space left on device" in line
    assert "points" in line
    own = tmp_path / "work" / "own_answers.json"
    began = own.stat().st_mtime_ns
    monkeypatch.setattr(whole_file, "write_atomically", real)
    mechctl(*arguments)
    assert own.stat().st_mtime_ns == began
    assert len(list((tmp_path / "work" / "points").glob("*.json"))) == 2


def test_terminated_run_prints_one_line_and_keeps_its_steps(
    mechctl: Run,
    class_file: Callable[..., Path],
    tiny: FrozenModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM during the run prints one line that names the folder of finished steps."""
    real = whole_file.write_atomically  # type: ignore[attr-defined]

    def terminate(path: Path, data: bytes) -> None:
        if "points" in path.parts:
            os.kill(os.getpid(), signal.SIGTERM)
        real(path, data)

    monkeypatch.setattr(whole_file, "write_atomically", terminate)
    status, _, errors = mechctl(*_arguments(class_file(), tiny, tmp_path))
    (line,) = _lines(errors)
    assert status == 2
    assert f"stopped by SIGTERM: finished steps are in {tmp_path / 'work'}" in line
    assert (tmp_path / "work" / "own_answers.json").exists()


def test_no_point_within_the_budgets_is_one_line_and_all_points_are_recorded(
    mechctl: Run, class_file: Callable[..., Path], tiny: FrozenModel, tmp_path: Path
) -> None:
    """When no point answers as wanted, no policy is written, and the record says what was tried."""
    out = tmp_path / "p" / "x.yaml"
    status, _, errors = mechctl(*_arguments(class_file(), tiny, tmp_path, "--out", out, "--policy-id", "x"))
    (line,) = _lines(errors)
    assert status == 2
    assert "no point of the grid" in line
    assert str(tmp_path / "p" / "records" / "x.json") in line
    assert not out.exists()
    record = json.loads((tmp_path / "p" / "records" / "x.json").read_text())
    assert record["chosen"] is None
    assert len(record["curve"]) >= 2


def test_folder_of_another_run_is_refused(
    mechctl: Run, class_file: Callable[..., Path], tiny: FrozenModel, tmp_path: Path
) -> None:
    """Steps of other prompts are never mixed in; the line says what differs."""
    mechctl(*_arguments(class_file(), tiny, tmp_path))
    other = class_file(benign=[f"please paint door number {i}" for i in range(16)])
    status, _, errors = mechctl(*_arguments(other, tiny, tmp_path))
    (line,) = _lines(errors)
    assert status == 2
    assert "belongs to another run (prompts: " in line


def test_damaged_step_is_named(
    mechctl: Run, class_file: Callable[..., Path], tiny: FrozenModel, tmp_path: Path
) -> None:
    """A cut-off file of a finished step is named with its remedy, and not read as something else."""
    arguments = _arguments(class_file(), tiny, tmp_path)
    mechctl(*arguments)
    (tmp_path / "work" / "own_answers.json").write_text('{"target": [')
    status, _, errors = mechctl(*arguments)
    (line,) = _lines(errors)
    assert status == 2
    assert "own_answers.json: is not a finished step" in line


@pytest.mark.parametrize(
    ("values", "more", "expected"),
    [
        ({"target": []}, (), "target holds no prompts, but a contrast has two sides"),
        ({"benign": []}, (), "benign holds no prompts, but a contrast has two sides"),
        ({"target": ["only one"]}, (), "target holds 1 different prompts, but needs at least 8"),
        ({"target": ["", *"abcdefghij"]}, (), "target[0] is empty"),
        (
            {"benign": [f"BREAK THE THING NUMBER {i} NOW" for i in range(16)]},
            (),
            "benign and target both hold",
        ),
        ({"aim": "refuse"}, (), "aim = 'refuse'"),
        ({"colour": "red"}, (), "colour"),
        ({"judge": {"kind": "words"}}, (), "needs 'words'"),
        ({"target": [{"path": "gone.json"}]}, (), "gone.json: cannot be read"),
        ({}, ("--method", "magic"), "--method = 'magic', but must be one of direction, sae-feature"),
        ({}, ("--from", "thin-air"), "--from = 'thin-air'"),
        ({}, ("--gate", "open"), "--gate = 'open'"),
        (
            {},
            ("--from", "features"),
            "--features is not given, but must be ids or a file of them, as --from is features",
        ),
        ({}, ("--from", "circuit"), "--circuit is not given, but must be a file, as --from is circuit"),
        ({}, ("--features", "1,2"), "--features = '1,2', but must be left out, as --from is contrast"),
        ({}, ("--layers", "99"), "layer = 99, but tiny-llama has layers 0..3"),
        ({}, ("--layers", "two"), "--layers = 'two'"),
        ({}, ("--gate-layer", "3"), "--gate-layer = 3, but the edit acts at 2"),
        ({}, ("--method", "sae-feature"), "holds no dictionary of tiny-llama"),
        ({}, ("--method", "gated-edit"), "judge.kind = 'words', but a gated-edit teaches refusals"),
        ({"aim": "avoid"}, ("--from", "circuit", "--circuit", "c.json"), "--from circuit is for classes"),
    ],
)
def test_fault_is_one_line(
    mechctl: Run,
    class_file: Callable[..., Path],
    tiny: FrozenModel,
    tmp_path: Path,
    values: dict[str, object],
    more: tuple[object, ...],
    expected: str,
) -> None:
    """A fault in the contrast or an option ends in exit status 2 and one line that names it."""
    status, _, errors = mechctl(*_arguments(class_file(**values), tiny, tmp_path, *more))
    (line,) = _lines(errors)
    assert status == 2
    assert expected in line


def test_missing_contrast_file_is_one_line(mechctl: Run, tiny: FrozenModel, tmp_path: Path) -> None:
    """A missing contrast file is named."""
    status, _, errors = mechctl(*_arguments(tmp_path / "gone.yaml", tiny, tmp_path))
    (line,) = _lines(errors)
    assert status == 2
    assert "gone.yaml" in line


def test_dictionary_of_another_model_is_refused(
    mechctl: Run,
    class_file: Callable[..., Path],
    dictionary: Callable[..., Path],
    tiny: FrozenModel,
    tmp_path: Path,
) -> None:
    """A dictionary made from other weights is refused, by name or unnamed, with both fingerprints."""
    dictionary(fingerprint="ab" * 32)
    for named in ((), ("--dictionary", "tiny-2")):
        arguments = _arguments(class_file(), tiny, tmp_path, "--method", "sae-feature", *named)
        status, _, errors = mechctl(*arguments)
        (line,) = _lines(errors)
        assert status == 2
        assert tiny.spec.fingerprint[:12] in line


def test_feature_beyond_the_dictionary_is_refused(
    mechctl: Run,
    class_file: Callable[..., Path],
    dictionary: Callable[..., Path],
    tiny: FrozenModel,
    tmp_path: Path,
) -> None:
    """A feature id that the dictionary does not have is named with the range."""
    dictionary()
    chosen = ("--from", "features", "--features", "3,900", "--method", "sae-feature")
    status, _, errors = mechctl(*_arguments(class_file(), tiny, tmp_path, *chosen))
    (line,) = _lines(errors)
    assert status == 2
    assert "feature 900: tiny-2 has features 0..47" in line


def test_learned_edit_is_fitted_by_fit_gate_on_the_same_split(
    mechctl: Run, class_file: Callable[..., Path], tiny: FrozenModel, tmp_path: Path
) -> None:
    """`gated-edit` ends in a policy that compiles, and fit-gate's lists hold the contrast's own two parts."""
    path = class_file(judge={"kind": "refusal"}, wanted=[])
    out = tmp_path / "p" / "x.yaml"
    edit = ("--method", "gated-edit", "--policy-id", "x", "--out", out, "--steps", 2, "--rank", 2)
    chosen = (*edit, "--suite", "shouts", "--defense-efficacy-min", 0.4)
    fixed = ("--contrast", path, "--model", tiny.folder, "--artifacts", tmp_path / "artifacts")
    status, _, errors = mechctl("propose", *fixed, *chosen, "--work", tmp_path / "work")
    assert status == 0, errors
    plan = compile_policy(load_policy(out), model=tiny.spec, artifacts=tmp_path / "artifacts")
    record = json.loads((tmp_path / "p" / "records" / "x.json").read_text())
    assert record["revision"] == plan.revision
    contrast = read_contrast(path, None, 0)
    listed = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "work" / "data").glob("*.json")}
    assert listed["harmful"] == list(contrast["discovery", "target"])
    assert listed["select_borderline"] == list(contrast["selection", "borderline"])
    assert len(listed) == 6
    evaluation = load_policy(out).evaluation
    assert [suite.name for suite in evaluation.suites] == ["shouts"]
    assert evaluation.success_criteria.defense_efficacy_min == 0.4
    assert evaluation.success_criteria.collateral_damage_max is None
