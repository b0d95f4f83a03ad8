"""Dictionaries: SAELens trains them, a killed run ends the same, the metrics are sane at their extremes."""

import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file
from torch import Tensor

from discovery.data.activations import TraceReader, read_held_out, shuffled_batches, text_to_measure
from discovery.data.sources import DataList, Source
from discovery.data.trace import trace
from discovery.data.trace_settings import TraceSettings
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.jobs.stopping import Stopped
from discovery.sae import sae_train
from discovery.sae.dictionary_artifact import measure, write_dictionary
from discovery.sae.sae_train import reconstruction, save_dictionary, train
from discovery.sae.saelens_metrics import saelens_metrics
from discovery.sae.splice import splice_by_part, splice_metrics
from discovery.sae.train_settings import TrainSettings
from interpretops.artifacts.dictionary.load import open_dictionary
from interpretops.artifacts.dictionary.manifest import read_manifest

SETTINGS = TrainSettings(layer=2, width=64, k=4, tokens=64 * 40, batch=64, learning_rate=1e-3)


@pytest.fixture(scope="module")
def traced(tiny: FrozenModel, tmp_path_factory: pytest.TempPathFactory) -> TraceReader:
    """A small trace of the tiny model at layer 2."""
    folder = tmp_path_factory.mktemp("traced")
    path = folder / "text.txt"
    path.write_text("".join(f"Line {i}: the sum of {i} and {i * 7} is {i * 8}.\n" for i in range(120)))
    settings = TraceSettings(layers=(2,), context=48, held_out_share=0.2)
    data = DataList({"text": (Source(path, "text", "Apache-2.0", "lines"),)})
    trace(tiny, data, settings, folder / "t")
    return TraceReader(folder / "t", 2)


def test_killed_training_ends_with_the_same_weights(
    traced: TraceReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed after its checkpoint and started again ends with the weights of an unbroken run."""
    whole = train(traced, SETTINGS, tmp_path / "whole", checkpoint_steps=10).sae.state_dict()
    real = sae_train._save

    def dies(*arguments: object) -> None:
        real(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(sae_train, "_save", dies)
    with pytest.raises(KeyboardInterrupt):
        train(traced, SETTINGS, tmp_path / "broken", checkpoint_steps=10)
    monkeypatch.undo()
    resumed = train(traced, SETTINGS, tmp_path / "broken", checkpoint_steps=10).sae.state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_its_step(
    traced: TraceReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """SIGINT and SIGTERM save the very step they came in; the weights end up as those of an unbroken run."""
    whole = train(traced, SETTINGS, tmp_path / "whole").sae.state_dict()
    seen = 0

    def asked(*arguments: Any) -> Iterator[Tensor]:
        nonlocal seen
        for batch in shuffled_batches(*arguments):
            seen += 1
            if seen == 7:
                os.kill(os.getpid(), number)
            yield batch

    monkeypatch.setattr(sae_train, "shuffled_batches", asked)
    with pytest.raises(Stopped, match=rf"{number.name}: step 7 of 40 is saved in "):
        train(traced, SETTINGS, tmp_path / "broken")
    resumed = train(traced, SETTINGS, tmp_path / "broken").sae.state_dict()
    assert seen == 40 + 1  # one batch more is drawn before the end is seen
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_full_disk_leaves_the_checkpoint_before(traced: TraceReader, tmp_path: Path) -> None:
    """A checkpoint that does not fit ends in one line; the one before it stands and is gone on from."""
    whole = train(traced, SETTINGS, tmp_path / "whole").sae.state_dict()
    real = sae_train._save
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_after_one(*arguments: Any) -> None:
        real(*arguments)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sae_train, "_save", full_after_one)
            with pytest.raises(DiscoveryError) as caught:
                train(traced, SETTINGS, tmp_path / "full", checkpoint_steps=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "cannot be written" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["checkpoint"]
    resumed = train(traced, SETTINGS, tmp_path / "full", checkpoint_steps=10).sae.state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def test_killed_while_checkpoints_change_places_it_goes_on(traced: TraceReader, tmp_path: Path) -> None:
    """A kill after the old checkpoint is gone and before the new one has its name loses no step."""
    train(traced, SETTINGS, tmp_path)
    (tmp_path / "checkpoint").rename(tmp_path / ".checkpoint.old")
    assert train(traced, SETTINGS, tmp_path).n_training_steps == 40
    assert not (tmp_path / ".checkpoint.old").exists()


def test_damaged_checkpoint_is_named(traced: TraceReader, tmp_path: Path) -> None:
    """A checkpoint that cannot be read ends in one line that names it."""
    train(traced, SETTINGS, tmp_path)
    path = tmp_path / "checkpoint" / "sae_weights.safetensors"
    whole = path.read_bytes()
    for damaged in (whole[:1000], whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(damaged)
        with pytest.raises(
            DiscoveryError, match=r"checkpoint: is not a finished step \(.*; delete it, and run"
        ):
            train(traced, SETTINGS, tmp_path)


def test_other_settings_do_not_go_on_from_a_checkpoint(traced: TraceReader, tmp_path: Path) -> None:
    """A checkpoint of another width is refused, and the setting is named."""
    train(traced, SETTINGS, tmp_path, checkpoint_steps=40)
    with pytest.raises(DiscoveryError, match="learning_rate"):
        train(traced, TrainSettings(**{**vars(SETTINGS), "learning_rate": 2e-3}), tmp_path)


def test_trained_dictionary_is_what_the_library_reads(
    tiny: FrozenModel, traced: TraceReader, tmp_path: Path
) -> None:
    """The folder carries manifest and metrics, and the library folds it to what SAELens computes."""
    trainer = train(traced, SETTINGS, tmp_path / "work")
    folder = tmp_path / "tiny-dictionary"
    save_dictionary(trainer, folder)
    extra = folder.with_name("extra.txt")
    extra.write_text("Something else altogether. " * 20)
    text = text_to_measure(tiny, Source(extra, "text"), 48, 200)
    metrics = measure(tiny, 2, traced.max_norm, folder, read_held_out(traced.folder, 20_000), text)
    write_dictionary(traced, SETTINGS, metrics, folder)
    manifest = read_manifest(folder)
    assert manifest.model.fingerprint == tiny.spec.fingerprint
    assert set(metrics["parts"]) == {"text", "extra"}
    assert metrics["tokens"] == metrics["parts"]["text"]["tokens"]
    assert metrics["saelens"]["l0"] == pytest.approx(metrics["l0"], abs=1e-3)
    assert manifest.metrics.fvu == metrics["fvu"] < 1.0
    assert manifest.training.data == ("lines (Apache-2.0)",)
    assert load_file(folder / "sae_weights.safetensors")["W_enc"].dtype == torch.float16
    x = traced.activations[:50].float()
    sae = SAE.load_from_disk(folder, dtype="float32")
    theirs = sae.encode(x)
    again, made = reconstruction(folder)(x)
    torch.testing.assert_close(again, theirs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made, sae.decode(theirs), rtol=1e-3, atol=1e-3)
    ours = open_dictionary(folder).encoder_rows()
    u = x @ torch.tensor(ours.read).T + torch.tensor(ours.bias)
    a = torch.where(u > torch.tensor(ours.threshold), u, torch.zeros(()))
    torch.testing.assert_close(a, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("rebuild", "delta_is_zero", "fvu"),
    [(lambda x: x, True, 0.0), (lambda x: x.mean(0).expand_as(x), False, 1.0)],
    ids=["identity", "mean"],
)
def test_metrics_at_their_extremes(
    tiny: FrozenModel,
    traced: TraceReader,
    rebuild: Callable[[Tensor], Tensor],
    delta_is_zero: bool,
    fvu: float,
) -> None:
    """A perfect dictionary costs nothing; one that knows the mean alone explains nothing."""
    held_out = read_held_out(traced.folder, 100_000)
    tokens, mask = held_out.tokens, held_out.mask
    found = splice_metrics(
        tiny, 2, traced.max_norm, lambda x: (torch.ones(len(x), 3), rebuild(x)), tokens, mask
    )
    assert (abs(found.delta_ce) < 1e-6) is delta_is_zero
    assert found.fvu == pytest.approx(fvu, abs=0.1)
    assert found.l0 == 3
    assert found.dead_share == 0


def test_bad_training_settings_are_refused(traced: TraceReader, tmp_path: Path) -> None:
    """A batch larger than the trace, and a layer that it does not have, are named with their values."""
    with pytest.raises(DiscoveryError, match="batch = 100000"):
        train(traced, TrainSettings(layer=2, width=64, k=4, tokens=200_000, batch=100_000), tmp_path)
    with pytest.raises(DiscoveryError, match=r"layer = 1 was not traced"):
        TraceReader(traced.folder, 1)


def test_metrics_agree_with_saelens_own(tiny: FrozenModel, traced: TraceReader, tmp_path: Path) -> None:
    """On the same tokens SAELens' own evaluation finds our figures, sinks left out on both sides."""
    folder = tmp_path / "tiny-dictionary"
    save_dictionary(train(traced, SETTINGS, tmp_path / "work"), folder)
    held_out = read_held_out(traced.folder, 3_000)
    tokens, mask = held_out.tokens, held_out.mask
    x = tiny.residuals(tokens, mask, [2])[2].norm(dim=-1)
    bound = float(x[mask.bool()].quantile(0.9))  # every tenth token counts as a sink
    ours = splice_metrics(tiny, 2, bound, reconstruction(folder), tokens, mask)
    theirs = saelens_metrics(tiny, 2, bound, folder, tokens, mask)
    assert theirs["explained_variance"] == pytest.approx(1 - ours.fvu, abs=1e-3)
    assert theirs["l0"] == pytest.approx(ours.l0, abs=1e-3)
    assert theirs["dead_share"] == pytest.approx(ours.dead_share, abs=1e-3)
    assert theirs["ce_loss_without_sae"] == pytest.approx(ours.ce_model, abs=1e-3)
    assert theirs["ce_loss_with_sae"] == pytest.approx(ours.ce_spliced, abs=1e-3)


def test_parts_add_up_to_the_whole(tiny: FrozenModel, traced: TraceReader, tmp_path: Path) -> None:
    """Each part is measured as if it were alone, and their tokens and losses add up to the whole's."""
    folder = tmp_path / "tiny-dictionary"
    save_dictionary(train(traced, SETTINGS, tmp_path / "work"), folder)
    held_out = read_held_out(traced.folder, 3_000)
    tokens, mask = held_out.tokens, held_out.mask
    names = ["even" if row % 2 == 0 else "odd" for row in range(len(tokens))]
    rebuild = reconstruction(folder)
    whole, parts = splice_by_part(tiny, 2, traced.max_norm, rebuild, tokens, mask, names)
    alone = splice_metrics(tiny, 2, traced.max_norm, rebuild, tokens[::2], mask[::2])
    assert parts["even"].fvu == pytest.approx(alone.fvu, rel=1e-4)
    assert parts["even"].delta_ce == pytest.approx(alone.delta_ce, abs=1e-5)
    assert whole.tokens == parts["even"].tokens + parts["odd"].tokens
    summed = sum(part.ce_spliced * part.tokens for part in parts.values())
    assert whole.ce_spliced * whole.tokens == pytest.approx(summed)
