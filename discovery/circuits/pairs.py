"""Contrast pairs: reads them from jsonl or csv, and tokenizes them to equal lengths."""

import csv
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from discovery.circuits.search_settings import PairFormat
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel

MAX_BYTES = 2**28

CLASS_ANSWERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "jailbreak": (
        ("I'm sorry", "Sorry", "Unfortunately", "As an AI"),
        ("Sure", "Here", "Certainly", "To ", "Of course", "Yes"),
    ),
}
"""Beginnings of refusals and of complying answers, for files without ``answer`` and ``wrong``."""


@dataclass(frozen=True)
class TextPair:
    """One contrast as written in a file."""

    where: str
    clean: str
    corrupted: str
    answers: tuple[str, ...]
    """Texts whose first tokens the model should favour on the clean prompt."""
    wrong: tuple[str, ...]
    paraphrase: str = ""
    """The wording of the contrast; empty if the file does not say."""
    topic: str = ""
    """Pairs of the same topic, whatever their wording, are held out together."""


@dataclass(frozen=True)
class Pair:
    """One contrast as token ids; both prompts have the same length."""

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answers: tuple[int, ...]
    wrong: tuple[int, ...]
    paraphrase: str = ""
    topic: str = ""


def read_pairs(path: Path, pair_format: PairFormat, *, whole_years: bool = True) -> list[TextPair]:
    """Read the pairs in a file. ``whole_years``: the tokenizer encodes two digits as one token."""
    rows = _rows(path)
    found = []
    for index, row in enumerate(rows):
        where = f"{path}: row {index + 1}"
        if not isinstance(row, dict):
            raise DiscoveryError(f"{where} = {str(row)[:60]!r}, but must be an object with clean, corrupted")
        clean = _prompt(row, "clean", where)
        corrupted = _prompt(row, pair_format.corrupted_column, where)
        if clean == corrupted:
            raise DiscoveryError(
                f"{where}: clean and {pair_format.corrupted_column} are the same; contrast them"
            )
        if pair_format.layout == "ioi":
            answers, wrong = _ioi_names(clean, where)
        elif pair_format.layout == "greater-than":
            answers, wrong = _later_years(row.get("label"), where, whole_years)
        else:
            answers = pair_format.answers or _texts(row, "answer", where)
            wrong = pair_format.wrong or _texts(row, "wrong", where)
        paraphrase, topic = (str(row.get(name) or "") for name in ("paraphrase", "topic"))
        found.append(TextPair(where, clean, corrupted, answers, wrong, paraphrase, topic))
    if not found:
        raise DiscoveryError(f"{path}: holds no pairs; write one object or row per pair")
    return found


def names_answers(path: Path) -> bool:
    """Whether any row of a file names an answer, right or wrong."""
    return any(isinstance(row, dict) and (row.get("answer") or row.get("wrong")) for row in _rows(path))


def _rows(path: Path) -> list[Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DiscoveryError(f"{path}: is larger than {MAX_BYTES} bytes; split it")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DiscoveryError(f"{path}: cannot be read ({error.strerror}); name an existing file") from error
    except UnicodeDecodeError as error:
        raise DiscoveryError(f"{path}: is not UTF-8 (byte {error.start}); convert it") from error
    if path.suffix == ".jsonl":
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise DiscoveryError(f"{path}: not valid JSONL ({error})") from error
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text)))
    raise DiscoveryError(f"{path}: ends in {path.suffix!r}, but pairs are read from .jsonl and .csv")


def _prompt(row: dict[str, Any], column: str, where: str) -> str:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise DiscoveryError(
            f"{where}: {column} = {text!r}, but a contrast has two sides, both text; add the other prompt"
        )
    return text


def _texts(row: dict[str, Any], column: str, where: str) -> tuple[str, ...]:
    """One text, several separated by ``|``, or a JSON list of texts."""
    value = row.get(column)
    parts = value.split("|") if isinstance(value, str) else value
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str) and part for part in parts):
        raise DiscoveryError(
            f"{where}: {column} = {value!r}, but must be text; or give --{column} for all pairs"
        )
    return tuple(parts)


def _ioi_names(clean: str, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Indirect object identification: the name that occurs once is the answer, the other one is wrong."""
    both = re.search(r"\b([A-Z][a-z]+) and ([A-Z][a-z]+)\b", clean)
    names = both.groups() if both else ()
    counts = {name: len(re.findall(rf"\b{name}\b", clean)) for name in names}
    if sorted(counts.values()) != [1, 2]:
        raise DiscoveryError(f"{where}: clean names {counts}, but IOI needs one name once and one twice")
    said = {count: name for name, count in counts.items()}
    return (f" {said[1]}",), (f" {said[2]}",)


def _later_years(label: Any, where: str, whole_years: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Greater-than: years above the label against the others; decades if digits are single tokens."""
    if not re.fullmatch(r"\d{1,2}", str(label)):
        raise DiscoveryError(f"{where}: label = {label!r}, but must be the two digits of a year")
    year = int(label)
    if whole_years:
        later = [f"{y:02d}" for y in range(year + 1, 100)]
        return tuple(later), tuple(f"{y:02d}" for y in range(year + 1))
    decade = year // 10
    return tuple(map(str, range(decade + 1, 10))), tuple(map(str, range(decade)))


def encode_pairs(
    model: FrozenModel, texts: Sequence[TextPair], pair_format: PairFormat
) -> tuple[list[Pair], int]:
    """Pairs as tokens, and the number skipped. Refuses, or skips, pairs whose sides do not align."""
    encode = model.chat_ids if pair_format.chat else model.text_ids
    found, reasons = [], []
    for text in texts:
        clean, corrupted = tuple(encode(text.clean)), tuple(encode(text.corrupted))
        answers, wrong = _first_tokens(model, text.answers), _first_tokens(model, text.wrong)
        if len(clean) != len(corrupted):
            reasons.append(
                f"{text.where}: clean has {len(clean)} tokens and corrupted {len(corrupted)}, but both "
                "must have the same number; reword one, or give --skip-unfit"
            )
        elif not answers - wrong or not wrong - answers:
            reasons.append(
                f"{text.where}: answers {list(text.answers)[:3]} and wrong {list(text.wrong)[:3]} leave one "
                "side without a first token of its own; reword them, or give --skip-unfit"
            )
        else:
            own, others = tuple(sorted(answers - wrong)), tuple(sorted(wrong - answers))
            found.append(Pair(clean, corrupted, own, others, text.paraphrase, text.topic))
            continue
        if not pair_format.skip_unfit:
            raise DiscoveryError(reasons[0])
    if not found:
        raise DiscoveryError(f"no pair is left ({len(reasons)} skipped); the first: {reasons[0]}")
    return found, len(reasons)


def _first_tokens(model: FrozenModel, texts: Sequence[str]) -> set[int]:
    return {ids[0] for ids in map(model.text_ids, texts) if ids}


def split_pairs(pairs: Sequence[Pair], held_out: float, limit: int | None) -> tuple[list[Pair], list[Pair]]:
    """Discovery and evaluation pairs, in an order independent of the seed; no topic is in both."""
    groups: dict[object, list[Pair]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.topic or index, []).append(pair)
    shuffled = list(groups.values())
    random.Random(0).shuffle(shuffled)  # noqa: S311 (an order, no secret)
    order = [pair for group in shuffled for pair in group][:limit]
    kept = len(order) - round(len(order) * held_out)
    while 0 < kept < len(order) and order[kept].topic and order[kept].topic == order[kept - 1].topic:
        kept -= 1
    if not 1 <= kept < len(order):
        raise DiscoveryError(
            f"{len(order)} pairs with held-out = {held_out} leave {kept} to find the circuit and "
            f"{len(order) - kept} to measure it; both need at least one, of different topics"
        )
    return order[:kept], order[kept:]


def batches(pairs: Sequence[Pair], size: int) -> Iterator[list[int]]:
    """Batches of indices of equally long pairs, at most ``size`` each, so that nothing is padded."""
    lengths: dict[int, list[int]] = {}
    for index, pair in enumerate(pairs):
        lengths.setdefault(len(pair.clean), []).append(index)
    for _, indices in sorted(lengths.items()):
        for start in range(0, len(indices), size):
            yield indices[start : start + size]


def shared_start(sequences: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all sequences share, at most all but the last, which is always run."""
    first = sequences[0]
    most = min(map(len, sequences)) - 1
    return next((i for i in range(most) if any(row[i] != first[i] for row in sequences)), most)


def contrast_start(pairs: Sequence[Pair]) -> int:
    """Number of leading tokens that the clean and the corrupted prompt share in every pair."""
    return min(shared_start([pair.clean, pair.corrupted]) for pair in pairs)
