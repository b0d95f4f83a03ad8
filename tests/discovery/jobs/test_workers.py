"""Jobs spread over two workers by torch's launcher: the same trace, the documented dictionary, clean ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from discovery.data.activations import TraceReader
from discovery.data.sources import DataList, Source
from discovery.data.trace import trace
from discovery.data.trace_settings import TraceSettings
from discovery.frozen_model import FrozenModel
from discovery.sae.sae_train import train
from discovery.sae.train_settings import TrainSettings

PROGRAM = [sys.executable, "-m", "mechctl.main"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "INTERPRETOPS_MODEL_DTYPE": "float32"}


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "lines.txt"
    path.write_text("".join(f"Line {i}: the sum of {i} and {i * 7} is {i * 8}.\n" for i in range(92)))
    return path


SHARDED = {"context": 48, "held_out_share": 0.2, "shard_sequences": 1}


@pytest.fixture(scope="module")
def traced(tiny: FrozenModel, text: Path) -> TraceReader:
    """The trace that one process makes, of an odd number of shards."""
    torch.set_num_threads(1)
    folder = text.with_name("alone")
    record = trace(tiny, data(text), TraceSettings((2,), **SHARDED), folder)  # type: ignore[arg-type]
    assert len(record["shards"]) % 2 == 1
    return TraceReader(folder, 2)


def data(text: Path) -> DataList:
    return DataList({"given": (Source(text, "text"),)})


def arguments(tiny: FrozenModel, text: Path, out: Path) -> list[str]:
    """The same trace by command, with two workers."""
    flags = ("--context", 48, "--held-out", 0.2, "--shard-sequences", 1, "--workers", 2)
    told = ("trace", "--model", tiny.folder, "--text", text, "--layers", 2, "--out", out, *flags)
    return [*PROGRAM, *map(str, told)]


def test_two_workers_write_the_same_trace_as_one(
    tiny: FrozenModel, traced: TraceReader, text: Path, tmp_path: Path
) -> None:
    """A signal stops both in one line, and the same command finishes the trace, byte for byte what one
    process writes."""
    out = tmp_path / "t"
    process = subprocess.Popen(arguments(tiny, text, out), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (out / "shard-00006.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 2
    assert len([line for line in told.splitlines() if "shards are finished" in line]) == 1, told
    assert "Traceback" not in told
    begun = json.loads((out / "trace.json").read_text())
    assert 5 < len(begun["shards"]) < len(traced.record["shards"])
    assert not begun["complete"]
    done = run(arguments(tiny, text, out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("attention sinks left out") == 1
    record = json.loads((out / "trace.json").read_text())
    for key in ("shards", "held_out", "max_norm", "sequences", "complete"):
        assert record[key] == traced.record[key]
    TraceReader(out, 2)  # which checks every shard's sha256


def test_one_process_resumes_a_trace_of_two_workers(
    tiny: FrozenModel, traced: TraceReader, text: Path, tmp_path: Path
) -> None:
    """The number of workers is not part of a trace: its record does not name it."""
    partial = dict(traced.record, shards=traced.record["shards"][:6], complete=False)
    (tmp_path / "trace.json").write_text(json.dumps(partial))
    settings = TraceSettings((2,), **SHARDED)  # type: ignore[arg-type]
    assert trace(tiny, data(text), settings, tmp_path)["shards"] == traced.record["shards"]
    assert "workers" not in json.dumps(traced.record)


SETTINGS = {"layer": 2, "width": 64, "tokens": 64 * 40, "batch": 64, "learning_rate": 1e-3}


def sae_train(traced: TraceReader, tiny: FrozenModel, work: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Train with two workers; the last checkpoint's weights."""
    settings = {"k": 4} | SETTINGS | options
    flags = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    told = (
        "sae-train",
        "--trace",
        traced.folder,
        "--model",
        tiny.folder,
        "--out",
        work / "out",
        "--work",
        work,
    )
    done = run([*PROGRAM, *map(str, (*told, "--workers", 2, *flags))])
    assert done.returncode == 0, done.stderr
    assert (work / "out" / "manifest.yaml").exists()
    return load_file(work / "checkpoint" / "sae_weights.safetensors")


def test_two_workers_train_the_same_weights_as_one(
    traced: TraceReader, tiny: FrozenModel, tmp_path: Path
) -> None:
    """If each half of a batch selects the same features, the weights are those of one process."""
    found = sae_train(traced, tiny, tmp_path / "two", k=63.9)
    alone = train(traced, TrainSettings(k=63.9, **SETTINGS), tmp_path / "one")  # type: ignore[arg-type]
    expected = load_file(tmp_path / "one" / "checkpoint" / "sae_weights.safetensors")
    assert alone.n_training_steps == 40
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-4, msg=name)
