"""Reading data files: every layout gives the same prompts, every fault one clear line."""

import csv
import json
from pathlib import Path

import pytest

from discovery.data.sources import (
    Source,
    licence_of_weights,
    read_data_list,
    read_prompts,
    read_text,
    refuse_noncommercial,
)
from discovery.errors import DiscoveryError
from interpretops.artifacts.dictionary.manifest import read_manifest

ARTIFACTS = Path(__file__).resolve().parents[3] / "sae_artifacts"
PROMPTS = ["Who are you?", 'Say "yes", then no', "Grüße aus Köln"]


def _write(path: Path) -> Path:
    objects = [{"prompt": prompt} for prompt in PROMPTS]
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(PROMPTS))
        case ".jsonl":
            path.write_text("\n".join(json.dumps(item) for item in objects))
        case ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["id", "prompt"])
                writer.writeheader()
                writer.writerows({"id": i, "prompt": p} for i, p in enumerate(PROMPTS))
        case ".txt":
            path.write_text("\n\n".join(PROMPTS) + "\n")
        case ".yaml":
            path.write_text(json.dumps({"harmful": PROMPTS, "licence": "Apache-2.0"}))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".txt", ".yaml"])
def test_every_layout_gives_the_same_prompts(tmp_path: Path, suffix: str) -> None:
    """json, jsonl, csv, txt and yaml files of the same prompts read alike."""
    assert read_prompts(Source(_write(tmp_path / f"p{suffix}"), "prompts")) == PROMPTS


def test_parts_of_a_source_are_disjoint_and_complete(tmp_path: Path) -> None:
    """The parts [0, 0.6] and [0.6, 1] of a file share no prompt and miss none, run after run."""
    path = tmp_path / "p.json"
    prompts = [f"prompt {i}" for i in range(50)]
    path.write_text(json.dumps(prompts))
    low = read_prompts(Source(path, "prompts", part=(0.0, 0.6)))
    high = read_prompts(Source(path, "prompts", part=(0.6, 1.0)))
    assert len(low) == 30
    assert sorted(low + high) == sorted(prompts)
    assert low == read_prompts(Source(path, "prompts", part=(0.0, 0.6)))
    assert low[:5] == read_prompts(Source(path, "prompts", part=(0.0, 0.6), limit=5))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.json", "{", "not valid JSON"),
        ("p.json", "[]", "holds no prompts"),
        ("p.json", '["a", 3]', "[1] = 3"),
        ("p.json", '[{"colour": "red"}]', "['colour']"),
        ("p.json", '{"a": [], "b": []}', "must hold a list"),
        ("p.xlsx", "x", "ends in '.xlsx'"),
        ("p.txt", "", "holds no prompts"),
    ],
)
def test_bad_prompt_file_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    """A file that holds no prompts is named, with what is wrong in it, in one line."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DiscoveryError) as caught:
        read_prompts(Source(path, "prompts"))
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    """A file that is not there is named, for prompts as for text."""
    for read, kind in ((read_prompts, "prompts"), (read_text, "text")):
        with pytest.raises(DiscoveryError, match=r"gone\.txt: cannot be read"):
            read(Source(tmp_path / "gone.txt", kind))  # type: ignore[arg-type]


def test_data_list_names_wrong_entry(tmp_path: Path) -> None:
    """An entry with an unknown key is refused with its group and index."""
    path = tmp_path / "data.yaml"
    path.write_text("harmful:\n  - path: a.json\n  - path: b.json\n    colour: red\n")
    with pytest.raises(DiscoveryError, match=r"harmful\[1\]"):
        read_data_list(path)


def test_noncommercial_data_is_refused() -> None:
    """Data under a non-commercial licence never enters what ships."""
    with pytest.raises(DiscoveryError, match=r"alpaca\.json: licence = 'CC BY-NC 4\.0'"):
        refuse_noncommercial([Source(Path("alpaca.json"), "prompts", "CC BY-NC 4.0")], purpose="a dictionary")
    refuse_noncommercial([Source(Path("x.json"), "prompts", "CC BY-SA 3.0")], purpose="a dictionary")


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        (["Apache-2.0", "public domain", "MIT", "CC BY 4.0"], "Apache-2.0"),
        (["Apache-2.0", "CC BY-SA 3.0"], "CC BY-SA 3.0"),
    ],
)
def test_share_alike_data_pass_their_licence_on(licences: list[str], expected: str) -> None:
    """Weights made from share-alike text are not marked as ours to license freely."""
    assert licence_of_weights(licences) == expected


@pytest.mark.parametrize(
    "path", sorted(ARTIFACTS.glob("*/*/manifest.yaml")), ids=lambda path: path.parent.name
)
def test_shipped_dictionary_is_under_the_licence_of_its_data(path: Path) -> None:
    """A shipped dictionary's manifest names the licence that its training data ask for."""
    manifest = read_manifest(path.parent)
    licences = [name.rpartition("(")[2].rstrip(")") for name in manifest.training.data]
    assert manifest.license == licence_of_weights(licences)
