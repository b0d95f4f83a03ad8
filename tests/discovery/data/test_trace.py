"""Tracing: what lies on disk is the model's residual stream, and an interrupted run ends up the same."""

import json
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from discovery.data import trace as tracing
from discovery.data.activations import TraceReader, shuffled_batches
from discovery.data.sequences import build_sequences, continued
from discovery.data.sources import DataList, Source
from discovery.data.trace import trace
from discovery.data.trace_settings import TraceSettings
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel, norm_bound
from discovery.jobs.stopping import Stopped

SETTINGS = TraceSettings(
    layers=(1, 2),
    context=64,
    answer_tokens=3,
    written_tokens=12,
    shard_sequences=8,
    held_out_share=0.1,
    dtype="bfloat16",
)


@pytest.fixture
def data(prompts: Path) -> DataList:
    text = prompts.with_name("text.txt")
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    openings = prompts.with_name("openings.txt")
    openings.write_text("Once upon a time\nIn 1\nThe\n")
    return DataList(
        {
            "data": (
                Source(prompts, "prompts", "Apache-2.0"),
                Source(text, "text", "public domain"),
                Source(openings, "openings", "Apache-2.0", times=4),
            )
        }
    )


def test_stored_rows_are_the_residual_stream(tiny: FrozenModel, data: DataList, tmp_path: Path) -> None:
    """Each stored row is what the model computes at that token, sinks excepted."""
    record = trace(tiny, data, SETTINGS, tmp_path / "t")
    shard = load_file(tmp_path / "t" / record["shards"][0]["file"])
    first = shard["sequence"] == 0
    # Positions are complete where no token was a sink, so that the sequence can be run again.
    ids = shard["tokens"][first]
    assert shard["position"][first].tolist() == list(range(len(ids)))
    for layer in SETTINGS.layers:
        again = tiny.residuals(ids[None].long(), torch.ones(1, len(ids), dtype=torch.long), [layer])[layer][0]
        stored = shard[f"blocks.{layer}.hook_resid_post"][first].float()
        torch.testing.assert_close(stored, again, rtol=1e-2, atol=1e-2)


def test_interrupted_trace_gives_the_same_shards(
    tiny: FrozenModel, data: DataList, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed between shards and started again writes byte for byte what an unbroken run writes."""
    whole = trace(tiny, data, SETTINGS, tmp_path / "whole")
    real, calls = tracing._trace_shard, 0

    def dies(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tracing, "_trace_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        trace(tiny, data, SETTINGS, tmp_path / "broken")
    with pytest.raises(DiscoveryError, match="not finished"):
        TraceReader(tmp_path / "broken", 1)
    monkeypatch.undo()
    resumed = trace(tiny, data, SETTINGS, tmp_path / "broken")
    assert len(resumed["shards"]) > 3
    assert resumed["shards"] == whole["shards"]
    assert resumed["held_out"] == whole["held_out"]


def test_other_settings_do_not_mix_into_a_trace(tiny: FrozenModel, data: DataList, tmp_path: Path) -> None:
    """Going on with another setting is refused, and the setting is named."""
    trace(tiny, data, SETTINGS, tmp_path)
    with pytest.raises(DiscoveryError, match="context: 64 there, 48 here"):
        trace(tiny, data, replace(SETTINGS, context=48), tmp_path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layers": (9,)}, "layer = 9, but tiny-llama has layers 0..3"),
        ({"context": 16, "answer_tokens": 8}, "the chat format alone takes"),
    ],
)
def test_bad_setting_is_refused(
    tiny: FrozenModel, data: DataList, tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    """A setting that does not fit the model is named with its value, and nothing is written."""
    with pytest.raises(DiscoveryError) as caught:
        trace(tiny, data, replace(SETTINGS, **change), tmp_path / "t")  # type: ignore[arg-type]
    assert expected in str(caught.value)
    assert not (tmp_path / "t").exists()


def test_sinks_are_left_out(tiny: FrozenModel, data: DataList, tmp_path: Path) -> None:
    """Tokens above the recorded norm bound are in no shard and are counted as sinks."""
    record = trace(tiny, data, replace(SETTINGS, sink_ratio=1.05), tmp_path)
    bound = record["max_norm"]["blocks.1.hook_resid_post"]
    rows = TraceReader(tmp_path, 1).activations.float()
    assert float(rows.norm(dim=-1).max()) <= bound * 1.01
    assert sum(entry["sinks"] for entry in record["shards"]) > 0
    assert sum(entry["stored"] for entry in record["shards"]) == len(rows)


def test_norm_bound_ignores_the_sinks_it_is_for() -> None:
    """A few tokens two orders above the rest do not move the bound."""
    norms = torch.full((1000,), 170.0)
    norms[:20] = 23_000.0
    assert norm_bound(norms, 8.0) == pytest.approx(1360.0)


def test_damaged_shard_is_refused(tiny: FrozenModel, data: DataList, tmp_path: Path) -> None:
    """A shard that differs from its recorded sha256 is not trained on."""
    record = trace(tiny, data, SETTINGS, tmp_path)
    path = tmp_path / record["shards"][1]["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DiscoveryError, match=path.name):
        TraceReader(tmp_path, 1)


def test_record_says_what_it_was_made_of(tiny: FrozenModel, data: DataList, tmp_path: Path) -> None:
    """The run record carries hashes, licences, seed, model fingerprint and versions, and no folder."""
    trace(tiny, data, SETTINGS, tmp_path / "t")
    text = (tmp_path / "t" / "trace.json").read_text()
    record = json.loads(text)
    assert record["model"]["fingerprint"] == tiny.spec.fingerprint
    assert [entry["licence"] for entry in record["data"]["data"]] == [
        "Apache-2.0",
        "public domain",
        "Apache-2.0",
    ]
    assert all(len(entry["sha256"]) == 64 for entry in record["data"]["data"])
    assert {"seed", "commit", "versions"} <= set(record)
    assert str(tmp_path) not in text


def test_batches_depend_on_their_number_alone() -> None:
    """Starting at batch n gives what an unbroken run would see from batch n on."""
    rows = torch.arange(50, dtype=torch.float32)[:, None]
    unbroken = shuffled_batches(rows, 8, seed=3)
    first = [next(unbroken) for _ in range(15)]
    resumed = shuffled_batches(rows, 8, seed=3, start=7)
    for batch in first[7:]:
        assert torch.equal(next(resumed), batch)


def test_openings_become_texts_of_the_models_own(tiny: FrozenModel, data: DataList) -> None:
    """The model goes on from each opening, differently each time, and the same seed repeats it."""
    sources = [source for source in data.groups["data"] if source.kind == "openings"]
    sequences = build_sequences(tiny, sources, 64, 0, 12)
    assert len(sequences) == 3 * 4
    first = continued(tiny, sequences, 0, 12, seed=5)
    assert all(tuple(ids[: len(s.ids)]) == s.ids for ids, s in zip(first, sequences, strict=True))
    assert {len(ids) - len(s.ids) for ids, s in zip(first, sequences, strict=True)} <= set(range(1, 13))
    assert len({tuple(ids) for ids in first}) > 3
    assert continued(tiny, sequences, 0, 12, seed=5) == first
    assert continued(tiny, sequences, 0, 12, seed=6) != first


def test_openings_without_a_length_are_refused(tiny: FrozenModel, data: DataList, tmp_path: Path) -> None:
    """Openings in the data and no length for what is written from them: the option is named."""
    with pytest.raises(DiscoveryError, match="--written-tokens"):
        trace(tiny, data, replace(SETTINGS, written_tokens=0), tmp_path)


def test_held_out_sequences_carry_their_kind(tiny: FrozenModel, data: DataList, tmp_path: Path) -> None:
    """Chat, text and the model's own writing can be told apart among the held-out sequences."""
    trace(tiny, data, replace(SETTINGS, held_out_share=0.5), tmp_path)
    held_out = load_file(tmp_path / "held_out.safetensors")
    assert set(held_out["kind"].tolist()) == {0, 1, 2}
    chat = held_out["tokens"][held_out["kind"] == 0]
    assert all(tiny.tokenizer.decode(row).startswith("<|im_start|>user") for row in chat)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_stops_and_goes_on(
    tiny: FrozenModel,
    data: DataList,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    """SIGINT and SIGTERM end a trace in one line with its finished shards, and it ends up the same."""
    whole = trace(tiny, data, SETTINGS, tmp_path / "whole")
    real = tracing._trace_shard

    def asked(*arguments: Any) -> Any:
        if arguments[5] == 2:
            os.kill(os.getpid(), number)
        return real(*arguments)

    monkeypatch.setattr(tracing, "_trace_shard", asked)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=rf"{number.name}: 2 of \d+ shards are finished; run the same"):
        trace(tiny, data, SETTINGS, tmp_path / "broken")
    assert signal.getsignal(number) is before
    monkeypatch.undo()
    assert trace(tiny, data, SETTINGS, tmp_path / "broken")["shards"] == whole["shards"]


def test_full_disk_is_one_line_and_finished_shards_stand(
    tiny: FrozenModel, data: DataList, tmp_path: Path
) -> None:
    """A write that the system refuses names the shard; what was finished is gone on from."""
    whole = trace(tiny, data, SETTINGS, tmp_path / "whole")
    sizes = [(tmp_path / "whole" / entry["file"]).stat().st_size for entry in whole["shards"]]
    fitting = min(sizes[:2]) - 1  # the first two shards are read from a finished trace, a third does not fit
    partial = dict(whole, shards=whole["shards"][:2], complete=False)
    folder = tmp_path / "full"
    folder.mkdir()
    for entry in partial["shards"]:
        (folder / entry["file"]).write_bytes((tmp_path / "whole" / entry["file"]).read_bytes())
    (folder / "held_out.safetensors").write_bytes((tmp_path / "whole" / "held_out.safetensors").read_bytes())
    (folder / "trace.json").write_text(json.dumps(partial))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (min(fitting, min(sizes[2:]) - 1), limits[1]))
    try:
        with pytest.raises(DiscoveryError) as caught:
            trace(tiny, data, SETTINGS, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "shard-00002.safetensors: cannot be written (File too large); finished steps are kept" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert not list(folder.glob(".*"))
    assert trace(tiny, data, SETTINGS, folder)["shards"] == whole["shards"]
