"""Finished steps and checkpoints: a damaged file, or one of another run, is refused with the remedy."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from discovery.errors import DiscoveryError
from discovery.jobs.checksummed_file import load_json, load_tensors, save_json, save_tensors
from discovery.jobs.checksummed_lines import ChecksummedLines
from discovery.jobs.run_folder import claim_folder
from discovery.jobs.step_cache import StepCache, numbers, text
from discovery.jobs.training_checkpoint import restore_checkpoint, save_checkpoint


def training(seed: int = 0, width: int = 3) -> tuple[nn.Linear, torch.optim.Adam]:
    torch.manual_seed(seed)
    module = nn.Linear(width, 2)
    return module, torch.optim.Adam(module.parameters())


def step(module: Any, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    module(torch.ones(1, module.in_features)).sum().backward()
    optimizer.step()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of the run `mine`, after two steps."""
    module, optimizer = training()
    step(module, optimizer)
    step(module, optimizer)
    path = tmp_path / "edit.safetensors"
    save_checkpoint(module, optimizer, path, {"run": "mine"}, 2)
    return path


def restore(path: Path, identity: dict[str, str] | None = None, **shape: int) -> Any:
    return restore_checkpoint(*training(1, **shape), path, identity or {"run": "mine"})


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_weight(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


def without_metadata(path: Path) -> None:
    save_file(load_file(path), path)


def another_step(path: Path) -> None:
    content = path.read_bytes()
    assert b'"step":"2"' in content
    path.write_bytes(content.replace(b'"step":"2"', b'"step":"9"'))


DAMAGE = (
    cut,
    flip_a_weight,
    without_metadata,
    another_step,
    lambda path: path.write_bytes(b"junk"),
    lambda path: path.write_bytes(b""),
    lambda path: (path.unlink(), path.mkdir()),
)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_refused_with_the_remedy(
    checkpoint: Path, damage: Callable[[Path], object]
) -> None:
    """A checkpoint that was cut, changed by one bit, stripped or replaced is not restored."""
    assert restore(checkpoint) == 2
    damage(checkpoint)
    with pytest.raises(DiscoveryError) as told:
        restore(checkpoint)
    assert str(told.value).startswith(f"{checkpoint}: is not a finished step (")
    assert "; delete it, and run the same again" in str(told.value)
    assert "\n" not in str(told.value)


def test_checkpoint_of_another_run_is_refused(checkpoint: Path) -> None:
    """Another identity, or another shape under the same identity, is one line with the remedy."""
    with pytest.raises(
        DiscoveryError, match=r"belongs to another run: .*; delete it, .* or give another --work"
    ):
        restore(checkpoint, {"run": "yours"})
    with pytest.raises(DiscoveryError, match=r"does not fit this training \(.*; delete it"):
        restore(checkpoint, width=4)


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_any_changed_byte_of_a_finished_step_is_detected(tmp_path: Path, kind: str) -> None:
    """Values are read back as written, with numeric keys and empty tensors; each changed byte is noticed."""
    path = tmp_path / "step"
    if kind == "json":
        save_json(path, ["run", "step"], {1: [0.5, None], 10: {}, 9: "x"})
        assert load_json(path, ["run", "step"]) == {"1": [0.5, None], "10": {}, "9": "x"}
    else:
        made = {
            "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
            "n": torch.tensor(3),
            "e": torch.ones(0),
        }
        save_tensors(path, ["run", "step"], made, {"more": "text"})
        found, more = load_tensors(path, ["run", "step"])
        assert more["more"] == "text"
        assert all(torch.equal(found[name], value) for name, value in made.items())
    whole = path.read_bytes()
    read = load_json if kind == "json" else load_tensors
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        told = ""
        try:
            read(path, ["run", "step"])
        except DiscoveryError as error:
            told = str(error)
        if not told:
            # Between the values of JSON a blank may be another blank.
            assert kind == "json"
            assert json.loads(path.read_bytes()) == json.loads(whole)
        else:
            assert re.match(rf"{re.escape(str(path))}: (is not a finished step|belongs to another run)", told)


def test_steps_of_another_run_are_not_read(tmp_path: Path) -> None:
    """A file copied from another run's folder, or renamed to another step, is refused by name."""
    for run in ("one", "two"):
        cache = StepCache(tmp_path / run, {"run": run})
        assert cache.json("drawn", partial(list, [run])) == [run]
        cache.tensors("words", lambda: {"x": torch.ones(2)})
        cache.tensor("scores", lambda: torch.ones(2))
    for name in ("drawn.json", "words.safetensors", "scores.safetensors"):
        (tmp_path / "one" / name).write_bytes((tmp_path / "two" / name).read_bytes())
    cache = StepCache(tmp_path / "one", {"run": "one"})
    reads: tuple[Callable[[], Any], ...] = (
        lambda: cache.json("drawn", list),
        lambda: cache.tensors("words", dict),
        lambda: cache.tensor("scores", lambda: torch.ones(2)),
    )
    for read in reads:
        with pytest.raises(DiscoveryError, match="belongs to another run"):
            read()
    (tmp_path / "two" / "other.json").write_bytes((tmp_path / "two" / "drawn.json").read_bytes())
    with pytest.raises(DiscoveryError, match=r"other\.json: belongs to another run"):
        StepCache(tmp_path / "two", {"run": "two"}).json("other", list)


def test_finished_step_is_read_instead_of_computed_again(tmp_path: Path) -> None:
    """Numbers, a string and a tensor are read back unchanged; a result of another type is refused by name."""
    cache = StepCache(tmp_path, "run")

    def again() -> Any:
        raise AssertionError("the step was done again")

    assert cache.json("some", lambda: [1, 2.5], numbers) == [1.0, 2.5] == cache.json("some", again, numbers)
    assert cache.json("name", lambda: "cx_1", text) == "cx_1" == cache.json("name", again, text)
    cache.tensor("x", lambda: torch.arange(3))
    assert cache.tensor("x", again).tolist() == [0, 1, 2]
    assert cache.has("some")
    assert not cache.has("x")
    for name, read in (("some", text), ("name", numbers)):
        with pytest.raises(DiscoveryError, match=rf"{name}\.json: is not a finished step \(.*; delete it"):
            cache.json(name, again, read)
    cache.tensors("pair", lambda: {"y": torch.ones(1)})
    with pytest.raises(DiscoveryError, match=r"pair\.safetensors: is not a finished step"):
        cache.tensor("pair", again)


def test_work_folder_refuses_another_run(tmp_path: Path) -> None:
    """The same run resumes; another is told what differs; a folder with other files is not touched."""
    run = {"seed": 1, "layers": (2, 3)}
    claim_folder(tmp_path / "run", run, "give another --work")
    claim_folder(tmp_path / "run", run, "give another --work")
    with pytest.raises(
        DiscoveryError,
        match=r"run\.json: belongs to another run \(seed: 1 there, 2 here\); give another --work",
    ):
        claim_folder(tmp_path / "run", {**run, "seed": 2}, "give another --work")
    with pytest.raises(DiscoveryError, match=r"\(more: None there, 0 here\)"):
        claim_folder(tmp_path / "run", {**run, "more": 0}, "x")
    (tmp_path / "run" / "run.json").write_text("[]")
    with pytest.raises(DiscoveryError, match=r"run\.json: must hold a JSON object"):
        claim_folder(tmp_path / "run", run, "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DiscoveryError, match=r"mine: holds other files; give another --work"):
        claim_folder(tmp_path / "mine", run, "give another --work")
    claim_folder(tmp_path / "mine", run, "x", empty=False)


def test_damaged_line_is_named_and_an_incomplete_last_line_is_cut_off(tmp_path: Path) -> None:
    """A half-written last line is removed; a changed character in any line is noticed."""
    lines = ChecksummedLines(tmp_path / "lines.jsonl")
    written: list[dict[str, Any]] = [{"id": "a", "scores": [[-1.5, 2]]}, {"id": "b", "text": "ünï"}]
    for line in written:
        lines.append(line)
    with lines.path.open("a") as file:
        file.write('{"id": "c"')
    assert list(lines.read()) == written
    lines.append({"id": "c"})
    assert list(lines.read()) == [*written, {"id": "c"}]
    whole = lines.path.read_text()
    for old, new in (("-1.5", "-1.6"), ('"b"', '"x"'), ("{", "["), ('"id": "c", ', "")):
        lines.path.write_text(whole.replace(old, new))
        with pytest.raises(
            DiscoveryError, match=r"lines\.jsonl: line \d is damaged \(.*; delete that line to do it again"
        ):
            list(lines.read())
