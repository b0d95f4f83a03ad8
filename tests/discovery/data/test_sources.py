"""Reading data files: every layout gives the same prompts, every fault one clear line."""

import csv
import json
import random
from pathlib import Path

import pytest

from discovery.data.buried_requests import buried
from discovery.data.sources import (
    Source,
    licence_of_weights,
    read_conversations,
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


LINES = [
    {"prompt": "eins", "label": "benign", "lang": "de"},
    {"prompt": "zwei\u2028drei", "label": "harmful", "lang": "de"},
    {"prompt": "two", "label": "benign", "lang": "en"},
    {
        "prompt": "and now?",
        "label": "benign",
        "lang": "en",
        "conversation": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "1"},
            {"role": "user", "content": "and now?"},
            {"role": "assistant", "content": "2"},
        ],
    },
]


def _lines(folder: Path) -> Path:
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in LINES))
    return path


def test_where_takes_the_lines_with_these_values(tmp_path: Path) -> None:
    """A filter keeps lines whose fields have one of its values, and U+2028 does not end a line."""
    listed = tmp_path / "data.yaml"
    _lines(tmp_path)
    listed.write_text("a:\n- {path: lines.jsonl, where: {lang: de, label: [harmful, benign]}}\n")
    (source,) = read_data_list(listed).groups["a"]
    assert read_prompts(source) == ["eins", "zwei\u2028drei"]
    assert source.record()["where"] == (("lang", ("de",)), ("label", ("harmful", "benign")))
    with pytest.raises(DiscoveryError, match=r"\[0\] has no field 'colour', which 'where' names"):
        read_prompts(Source(tmp_path / "lines.jsonl", "prompts", where=(("colour", ("red",)),)))
    with pytest.raises(DiscoveryError, match=r"holds no prompts .*where \{'lang': \('fr',\)\}"):
        read_prompts(Source(tmp_path / "lines.jsonl", "prompts", where=(("lang", ("fr",)),)))


def test_turns_are_read_up_to_the_last_of_the_user(tmp_path: Path) -> None:
    """With turns, a line with a conversation gives its messages without the answer at its end."""
    found = read_conversations(Source(_lines(tmp_path), "prompts", turns=True))
    assert found[2:] == ["two", (("user", "one"), ("assistant", "1"), ("user", "and now?"))]
    (tmp_path / "bad.jsonl").write_text(
        '{"prompt": "a", "conversation": [{"role": "assistant", "content": "x"}]}'
    )
    with pytest.raises(DiscoveryError, match=r"\[0\]\.conversation has no user turn"):
        read_conversations(Source(tmp_path / "bad.jsonl", "prompts", turns=True))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("where: [a]", r"where = \['a'\], but must map fields"),
        ("where: {lang: 3}", r"where\.lang = 3, but must be a text or a list"),
        ("turns: 1", r"turns = 1, but must be true or false"),
        ("bury: [9, 2]", r"bury = \[9, 2\], but must be \[least, most\] words"),
    ],
)
def test_bad_choice_of_lines_is_refused(tmp_path: Path, entry: str, expected: str) -> None:
    """A filter, turns or bury of the wrong form is refused, with the entry's place."""
    path = tmp_path / "data.yaml"
    path.write_text(f"a:\n- {{path: p.jsonl, {entry}}}\n")
    with pytest.raises(DiscoveryError, match=r"a\[0\]\." + expected):
        read_data_list(path)


def test_request_is_buried_whole_in_as_many_words_as_asked() -> None:
    """A buried request stands unchanged among passages, sometimes first, last and between."""
    passages, places = ["one two three", "four five six seven"], set()
    for seed in range(40):
        text = buried("DO it", passages, 9, random.Random(seed))
        assert len(text.split()) == 11
        parts = text.split("\n\n")
        places.add((parts.index("DO it") > 0) + (parts[-1] == "DO it"))
    assert places == {0, 1, 2}


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
