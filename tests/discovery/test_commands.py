"""`mechctl trace`, `sae-train` and `sae-eval` end to end, and faults in one line."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from interpretops.artifacts import Artifacts
from interpretops.artifacts.dictionary import read_manifest
from interpretops.model.spec import read_model_spec
from interpretops.plan import Site
from mechctl.main import main


@pytest.fixture
def mechctl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs `mechctl` in this process; gives exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mechctl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def test_trace_then_sae_train_make_a_dictionary(  # type: ignore[no-untyped-def]
    mechctl, tiny_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    """`trace`, then `sae-train`, leave a dictionary that the library finds; `sae-eval` finds its figures."""
    traced, out = tmp_path / "traced", tmp_path / "artifacts" / "tiny-llama" / "tiny-2"
    model = ("--model", tiny_folder)
    status, text, errors = mechctl(
        "trace", "--prompts", prompts, "--layers", "1,2", "--out", traced, "--held-out", 0.2, *model
    )
    assert status == 0
    assert "shards" in text
    assert "tokens/s" in errors
    train = ("sae-train", "--trace", traced, "--layer", 2, "--out", out, "--work", tmp_path / "work")
    sizes = ("--width", 64, "--k", 4, "--tokens", 1280, "--batch", 64)
    status, text, _ = mechctl(*train, *sizes, *model)
    assert status == 0
    assert "delta_ce" in text
    found = Artifacts(tmp_path / "artifacts", read_model_spec(tiny_folder))
    dictionary = found.dictionary(Site(2, "resid_post"))
    assert dictionary.width == 64
    status, text, _ = mechctl("sae-eval", "--dictionary", out, "--trace", traced, *model)
    assert status == 0
    again = json.loads(text[text.index("{") :])
    assert again["delta_ce"] == pytest.approx(dictionary.manifest.metrics.delta_ce, abs=1e-4)
    assert again["saelens"]["l0"] == pytest.approx(again["l0"], abs=0.2)


def test_omitted_options_are_filled_in(  # type: ignore[no-untyped-def]
    mechctl, tiny_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`trace` takes the middle layer, `sae-train --traces` that one, twelve passes and a work folder of its
    own, so that another training does not meet its checkpoint."""
    monkeypatch.chdir(tmp_path)
    model = ("--model", tiny_folder)
    status, text, _ = mechctl("trace", "--prompts", prompts, "--out", "traced", "--held-out", 0.2, *model)
    assert status == 0
    assert "of layer 2," in text
    stored = int(re.search(r"([\d,]+) tokens stored", text)[1].replace(",", ""))  # type: ignore[index]
    small = ("--width", 64, "--k", 4, "--batch", 512, *model)
    for seed in (0, 1):
        status, _, errors = mechctl("sae-train", "--traces", "traced", "--out", "sae", "--seed", seed, *small)
        assert status == 0, errors
    assert read_manifest(Path("sae")).layer == 2
    assert f"/{12 * stored // 512 * 512:,} tokens" in errors
    assert len(list(Path("runs/sae-train").iterdir())) == 2


@pytest.mark.parametrize("job", ["trace", "search"])
def test_missing_gpu_stops_a_job(  # type: ignore[no-untyped-def]
    mechctl, tiny_folder: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    """`device: cuda` on a machine without a GPU: one line names the remedy, and no model is loaded."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("INTERPRETOPS_MODEL_DEVICE", "cuda")
    status, _, errors = mechctl(job, "--prompts", prompts, "--out", tmp_path / "x", "--model", tiny_folder)
    assert status == 2
    assert errors.count("\n") == 1
    assert "write device: auto" in errors


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("trace", "--layers", "1", "--prompts", "gone.json", "--out", "t"), "gone.json: cannot be read"),
        (("trace", "--layers", "1", "--out", "t"), "no data"),
        (("trace", "--layers", "one", "--out", "t"), "--layers = 'one'"),
        (("sae-train", "--trace", "gone", "--layer", "1", "--out", "d"), "holds no trace"),
        (
            ("sae-train", "--trace", "gone", "--layer", "1", "--out", "d", "--work", "d/w"),
            "lies in --out d",
        ),
        (("fit-gate", "--data", "gone.yaml", "--adapter", "a"), "gone.yaml"),
    ],
)
def test_fault_is_one_line(  # type: ignore[no-untyped-def]
    mechctl,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    expected: str,
) -> None:
    """A missing file or a wrong value ends in exit status 2 and one line that names it."""
    monkeypatch.chdir(tmp_path)
    status, _, errors = mechctl(*arguments, "--model", tiny_folder)
    lines = [line for line in errors.splitlines() if line.strip() and not line.startswith("Loading")]
    assert status == 2
    assert len(lines) == 1
    assert expected in lines[0]
