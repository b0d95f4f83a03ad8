"""The contrast that a policy is made from: target prompts, benign prompts, and the aim."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, Strict, ValidationError, model_validator

from discovery.circuits.pairs import read_pairs
from discovery.circuits.search_settings import PairFormat
from discovery.data.prompt_variants import words_of
from discovery.data.sources import (
    Source,
    read_data_list,
    read_prompts,
    read_text,
    refuse_noncommercial,
    sha256_of_file,
)
from discovery.errors import DiscoveryError
from discovery.gates.gate_data import Groups, is_harmful, load_gate_data
from interpretops.files.schema_faults import describe_faults
from interpretops.files.strict_yaml import read_yaml
from interpretops.policy.fields import Fraction, Identifier, StrictModel

Side = str
Part = str
SIDES: tuple[Side, ...] = ("target", "benign", "borderline")
PARTS: tuple[Part, ...] = ("discovery", "selection")
PIECE_CHARACTERS = 400
"""Characters in a piece of text: about 100 tokens."""
LEAST_PROMPTS = 8
"""The fewest prompts on the target and the benign side that can be split into discovery and selection."""


class PromptFile(StrictModel):
    """A file of prompts."""

    path: Annotated[str, Field(min_length=1, max_length=1024)]
    """File next to the class file or in the data folder: json, jsonl, csv, tsv, txt, yaml."""
    licence: str = "not stated"
    """Its licence; shipped artifacts are never made from non-commercial data."""
    name: str = ""
    """In a file of several lists: the list to use."""
    part: Annotated[tuple[Fraction, Fraction], Strict(False)] = (0.0, 1.0)
    """Share of the file, in a fixed shuffled order."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Most prompts."""
    use: Literal["both", "discovery", "selection"] = "both"
    """The part of the work that uses it; `both` splits it."""


Entries = Annotated[tuple[str | PromptFile, ...], Strict(False)]


class Judged(StrictModel):
    """How an answer is recognised."""

    kind: Literal["refusal", "words", "toxicity"] = "refusal"
    """`refusal`: a coherent refusal. `words`: one of `words` occurs. `toxicity`: profane or hateful words."""
    words: Annotated[tuple[str, ...], Strict(False)] = ()
    """For `words`: whole words or phrases, in any case."""

    @model_validator(mode="after")
    def _has_words(self) -> "Judged":
        if (self.kind == "words") != bool(self.words):
            raise ValueError("needs 'words' for kind 'words', and for that kind alone")
        return self


class ClassFile(StrictModel):
    """A risk class: prompts for both sides, and the aim."""

    name: Identifier
    """The class, as in a policy's `meta.target_class`."""
    aim: Literal["answer", "avoid"] = "answer"
    """`answer`: target prompts should get what `judge` recognises. `avoid`: answers should lack it."""
    target: Entries
    """Prompts that the policy targets."""
    benign: Entries
    """Prompts whose answers must not change."""
    borderline: Entries = ()
    """Benign prompts that look like targets."""
    text: Annotated[tuple[PromptFile, ...], Strict(False)] = ()
    """For aim `avoid`: files of plain text whose likelihood must not change."""
    wanted: Annotated[tuple[str, ...], Strict(False)] = ()
    """Wanted answers to target prompts; by default the project's own refusals."""
    words: Annotated[tuple[str, ...], Strict(False)] = ()
    """For method word-rows: words to strike, beyond those of the prompts and the judge."""
    judge: Judged = Judged()
    """What recognises the wanted (aim `answer`) or the unwanted (aim `avoid`) answer."""
    formats: Annotated[tuple[Literal["chat", "plain"], ...], Field(min_length=1), Strict(False)] = ("chat",)
    """How target prompts are sent: in the model's chat format, or continued as plain text."""
    selection_share: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of each side that is used only to choose strength and threshold."""


@dataclass(frozen=True)
class Contrast:
    """Prompts by part and side; no prompt is in two places."""

    name: str
    aim: Literal["answer", "avoid"]
    judge: Judged
    wanted: tuple[str, ...]
    prompts: dict[Part, dict[Side, tuple[str, ...]]]
    formats: tuple[Literal["chat", "plain"], ...] = ("chat",)
    text: dict[Part, tuple[str, ...]] = field(default_factory=dict)
    """Pieces of plain text."""
    words: tuple[str, ...] = ()
    """Words to strike, in addition to those found."""
    record: list[dict[str, Any]] = field(default_factory=list)
    """Name, sha256 and licence of every file."""

    def __getitem__(self, place: tuple[Part, Side]) -> tuple[str, ...]:
        part, side = place
        return self.prompts[part][side]


def read_contrast(path: Path, folder: Path | None, seed: int, target_class: str | None = None) -> Contrast:
    """Read a class file, a data list of `mechctl fit-gate`, or a pairs file of `mechctl search`."""
    if path.suffix in (".jsonl", ".csv"):
        return _from_pairs(path, seed, target_class or path.stem)
    document = read_yaml(path, DiscoveryError)
    if isinstance(document.data, dict) and "target" not in document.data and "name" not in document.data:
        return _from_data_list(path, folder, seed, target_class or "jailbreak")
    try:
        found = ClassFile.model_validate(document.data)
    except ValidationError as error:
        raise DiscoveryError("\n".join(describe_faults(error, document, ClassFile))) from error
    record = [{"path": path.name, "sha256": sha256_of_file(path)}]
    prompts: dict[Part, dict[Side, tuple[str, ...]]] = {"discovery": {}, "selection": {}}
    entries: dict[Side, Entries] = {
        "target": found.target,
        "benign": found.benign,
        "borderline": found.borderline,
    }
    for side, given in entries.items():
        parts = _read_side(given, f"{path}: {side}", (path.parent, folder or path.parent), record)
        for part, texts in zip(PARTS, _split(*parts, found, side, seed), strict=True):
            prompts[part][side] = texts
    contrast = Contrast(
        target_class or found.name,
        found.aim,
        found.judge,
        found.wanted,
        prompts,
        found.formats,
        _pieces(found.text, (path.parent, folder or path.parent), record),
        found.words,
        record,
    )
    return _checked(contrast, str(path))


def _read_side(
    entries: Sequence[str | PromptFile], where: str, roots: tuple[Path, Path], record: list[dict[str, Any]]
) -> tuple[list[str], list[str], list[str]]:
    """Prompts for both parts, for discovery only, and for selection only."""
    found: dict[str, list[str]] = {"both": [], "discovery": [], "selection": []}
    for index, entry in enumerate(entries):
        if isinstance(entry, str):
            if not entry.strip():
                raise DiscoveryError(f"{where}[{index}] is empty, but a prompt must have text")
            found["both"].append(entry)
            continue
        source = _source(entry, "prompts", roots)
        found[entry.use] += read_prompts(source)
        record.append(source.record())
    return found["both"], found["discovery"], found["selection"]


def _source(entry: PromptFile, kind: Literal["prompts", "text"], roots: tuple[Path, Path]) -> Source:
    beside = roots[0] / entry.path
    path = beside if beside.exists() else roots[1] / entry.path
    source = Source(path, kind, licence=entry.licence, name=entry.name, part=entry.part, limit=entry.limit)
    refuse_noncommercial([source], purpose="a policy")
    return source


def _pieces(
    entries: Sequence[PromptFile], roots: tuple[Path, Path], record: list[dict[str, Any]]
) -> dict[Part, tuple[str, ...]]:
    """Text cut into pieces that alternate between the parts, so that both sample the whole of every file."""
    pieces: list[str] = []
    for entry in entries:
        source = _source(entry, "text", roots)
        text = read_text(source)
        record.append(source.record())
        pieces += [text[at : at + PIECE_CHARACTERS] for at in range(0, len(text), PIECE_CHARACTERS)]
    return {"discovery": tuple(pieces[::2]), "selection": tuple(pieces[1::2])}


def _split(
    both: list[str], discovery: list[str], selection: list[str], found: ClassFile, side: Side, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    order = list(dict.fromkeys(both))
    random.Random(f"{seed}/{side}").shuffle(order)  # noqa: S311 (an order, no secret)
    cut = len(order) - round(len(order) * found.selection_share)
    chosen = tuple(dict.fromkeys([*order[cut:], *selection]))
    return tuple(p for p in dict.fromkeys([*order[:cut], *discovery]) if p not in chosen), chosen


def _from_pairs(path: Path, seed: int, target_class: str) -> Contrast:
    pairs = read_pairs(path, PairFormat(answers=("x",), wrong=("y",)))
    sides: dict[Side, list[str]] = {
        "target": [pair.clean for pair in pairs],
        "benign": [pair.corrupted for pair in pairs],
        "borderline": [],
    }
    plain = ClassFile(name=target_class, target=(), benign=())
    prompts: dict[Part, dict[Side, tuple[str, ...]]] = {"discovery": {}, "selection": {}}
    for side, texts in sides.items():
        prompts["discovery"][side], prompts["selection"][side] = _split(texts, [], [], plain, side, seed)
    record = [{"path": path.name, "sha256": sha256_of_file(path)}]
    return _checked(Contrast(target_class, "answer", Judged(), (), prompts, record=record), str(path))


def _from_data_list(path: Path, folder: Path | None, seed: int, target_class: str) -> Contrast:
    listed = read_data_list(path, folder)
    data = load_gate_data(listed, seed)
    prompts: dict[Part, dict[Side, tuple[str, ...]]] = {}
    chosen: tuple[tuple[Part, Groups], ...] = (
        ("discovery", data.train),
        ("selection", data.select),
    )
    for part, groups in chosen:
        sides: dict[Side, list[str]] = {"target": [], "benign": [], "borderline": []}
        for name, texts in groups.items():
            side: Side = "target" if is_harmful(name) else "borderline" if "borderline" in name else "benign"
            sides[side] += [words_of(prompt) for prompt in texts]
        prompts[part] = {side: tuple(dict.fromkeys(texts)) for side, texts in sides.items()}
    used = {name: entries for name, entries in listed.record().items() if not name.startswith("test_")}
    record = [
        {"path": path.name, "sha256": sha256_of_file(path)},
        *(e for group in used.values() for e in group),
    ]
    return _checked(Contrast(target_class, "answer", Judged(), (), prompts, record=record), str(path))


def _checked(contrast: Contrast, source: str) -> Contrast:
    for side in ("target", "benign"):
        both = contrast["discovery", side] + contrast["selection", side]
        if not both:
            other = "benign" if side == "target" else "target"
            raise DiscoveryError(
                f"{source}: {side} holds no prompts, but a contrast has two sides; add prompts that are not "
                f"{other}"
            )
        if len(both) < LEAST_PROMPTS or not contrast["discovery", side] or not contrast["selection", side]:
            raise DiscoveryError(
                f"{source}: {side} holds {len(both)} different prompts, but needs at least {LEAST_PROMPTS}, "
                "some for discovery and some for selection; add prompts"
            )
    for part in PARTS:
        for side in ("benign", "borderline"):
            for other in PARTS:
                shared = set(contrast[part, side]) & set(contrast[other, "target"])
                if shared:
                    raise DiscoveryError(
                        f"{source}: {side} and target both hold {min(shared)[:60]!r}; remove it from one"
                    )
    return contrast


def subset(prompts: Sequence[str], most: int, seed: int) -> list[str]:
    """A seeded choice of at most ``most`` prompts, in their original order."""
    if len(prompts) <= most:
        return list(prompts)
    kept = sorted(random.Random(seed).sample(range(len(prompts)), most))  # noqa: S311 (a choice, no secret)
    return [prompts[index] for index in kept]
