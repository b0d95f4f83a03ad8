"""Reads prompts and plain text from files, with their licences."""

import csv
import hashlib
import io
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from discovery.errors import DiscoveryError
from interpretops.files.strict_yaml import read_yaml

Kind = Literal["prompts", "text", "openings"]
KINDS: tuple[Kind, ...] = ("prompts", "text", "openings")
"""Prompts get the chat format, text is read unchanged, openings are continued by the model."""
MAX_BYTES = 2**30
Prompt = str | tuple[tuple[str, str], ...]
"""A user's words, or the (role, content) turns of a conversation that ends with them."""
PROMPT_COLUMNS = ("prompt", "Prompt", "question", "Question", "instruction", "goal", "text")
"""Fields that may hold the prompt in objects and tables; the first one present is used."""
ANSWER_COLUMNS = ("answer", "Answer", "reference", "target", "expected", "output", "completion", "response")
"""Fields that may hold the right answer of a task; the first one present is used."""


@dataclass(frozen=True)
class Source:
    """One file of a job's data."""

    path: Path
    kind: Kind
    licence: str = "not stated"
    name: str = ""
    part: tuple[float, float] = (0.0, 1.0)
    """The share of the file to use: prompts in a fixed shuffled order, text in file order."""
    times: int = 1
    """The number of texts that the model writes from each opening."""
    limit: int | None = None
    """The most prompts, or characters of text, to use; None for all."""
    wrap: bool = False
    """Put each prompt into one of the job's wrappers."""
    templates: str = ""
    """List of templates in the same file; each prompt is put into ``each`` of them (``{vp}``, ``{Vp}``)."""
    each: int = 1
    code: Literal["", "follow", "decode"] = ""
    """Encode each prompt, with an instruction to follow it or a request to decode it."""
    field: str | None = None
    """The field with the prompt in objects and tables; None for the first of `PROMPT_COLUMNS` present."""
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(field, values): only objects whose field has one of the values are used."""
    bury: tuple[int, int] | None = None
    """Put each prompt before, into or after ordinary text of this many words (least, most)."""
    turns: bool = False
    """Use the whole conversation of an object that has one (`conversation`), not its last user turn."""

    def record(self) -> dict[str, Any]:
        """The source's entry in a run record: file name and sha256, never its folder."""
        entry = asdict(self) | {"path": self.path.name, "sha256": sha256_of_file(self.path)}
        plain: dict[str, Any] = {
            "name": "",
            "limit": None,
            "wrap": False,
            "part": (0.0, 1.0),
            "field": None,
            "times": 1,
        }
        plain |= {"templates": "", "each": 1, "code": "", "where": (), "turns": False, "bury": None}
        return {key: value for key, value in entry.items() if key not in plain or value != plain[key]}


@dataclass(frozen=True)
class DataList:
    """The files of a job, sorted into named groups such as ``harmful`` and ``benign``."""

    groups: dict[str, tuple[Source, ...]] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        return {name: [source.record() for source in sources] for name, sources in self.groups.items()}


def sha256_of_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DiscoveryError(f"{path}: cannot be read ({error.strerror}); name an existing file") from error


def read_data_list(path: Path, folder: Path | None = None) -> DataList:
    """Read a YAML list of data: ``<group>: [{path, kind?, licence?, name?, part?, limit?, times?}, …]``.

    Relative paths are looked up next to the list, then in ``folder``.
    """
    document = read_yaml(path, DiscoveryError)
    roots = (path.parent, folder or path.parent)
    if not isinstance(document.data, dict) or not document.data:
        raise DiscoveryError(f"{path}: must map group names to lists of files")
    groups: dict[str, tuple[Source, ...]] = {}
    for group, entries in document.data.items():
        if not isinstance(entries, list) or not entries:
            raise DiscoveryError(f"{path}: {group} must be a list of at least one file")
        groups[group] = tuple(
            _source(entry, f"{path}: {group}[{index}]", roots) for index, entry in enumerate(entries)
        )
    return DataList(groups)


def _source(entry: Any, where: str, roots: tuple[Path, Path]) -> Source:
    allowed = {
        "path",
        "kind",
        "licence",
        "name",
        "part",
        "limit",
        "times",
        "wrap",
        "templates",
        "each",
        "code",
        "where",
        "turns",
        "bury",
    }
    if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= allowed:
        raise DiscoveryError(f"{where} = {entry!r}, but must be an object with path and of {sorted(allowed)}")
    if entry.get("kind", "prompts") not in KINDS:
        raise DiscoveryError(f"{where}.kind = {entry['kind']!r}, but must be one of {', '.join(KINDS)}")
    counts = {name: entry.get(name, 1) for name in ("times", "each")}
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise DiscoveryError(f"{where}.{name} = {count!r}, but must be a whole number of at least 1")
    if entry.get("code", "") not in ("", "follow", "decode"):
        raise DiscoveryError(f"{where}.code = {entry['code']!r}, but must be 'follow' or 'decode'")
    beside = roots[0] / str(entry["path"])
    part = entry.get("part", [0.0, 1.0])
    if not isinstance(part, list) or len(part) != 2 or not 0 <= part[0] < part[1] <= 1:
        raise DiscoveryError(f"{where}.part = {part!r}, but must be [low, high] with 0 <= low < high <= 1")
    if not isinstance(entry.get("turns", False), bool):
        raise DiscoveryError(f"{where}.turns = {entry['turns']!r}, but must be true or false")
    bury = entry.get("bury")
    if bury is not None and not (
        isinstance(bury, list) and [type(words) for words in bury] == [int, int] and 0 < bury[0] <= bury[1]
    ):
        raise DiscoveryError(f"{where}.bury = {bury!r}, but must be [least, most] words, at least 1")
    return Source(
        bury=None if bury is None else (bury[0], bury[1]),
        where=_filter(entry.get("where", {}), f"{where}.where"),
        turns=entry.get("turns", False),
        path=beside if beside.exists() else roots[1] / str(entry["path"]),
        kind=entry.get("kind", "prompts"),
        licence=str(entry.get("licence", "not stated")),
        name=str(entry.get("name", Path(entry["path"]).stem)),
        part=(float(part[0]), float(part[1])),
        times=counts["times"],
        templates=str(entry.get("templates", "")),
        each=counts["each"],
        code=entry.get("code", ""),
        wrap=bool(entry.get("wrap", False)),
        limit=None if entry.get("limit") is None else int(entry["limit"]),
    )


def _filter(entry: Any, where: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    if not isinstance(entry, dict):
        raise DiscoveryError(f"{where} = {entry!r}, but must map fields to a value or a list of values")
    found = {}
    for name, values in entry.items():
        listed = values if isinstance(values, list) else [values]
        if not listed or not all(isinstance(value, str) for value in listed):
            raise DiscoveryError(f"{where}.{name} = {values!r}, but must be a text or a list of texts")
        found[str(name)] = tuple(listed)
    return tuple(found.items())


def refuse_noncommercial(sources: Iterable[Source], *, purpose: str) -> None:
    """Raise if a source's licence forbids commercial use, so that no shipped artifact is made from it."""
    for source in sources:
        words = source.licence.upper().replace("-", " ").split()
        if "NC" in words or "NONCOMMERCIAL" in words:
            raise DiscoveryError(
                f"{source.path.name}: licence = {source.licence!r}, but {purpose} must not be made from "
                "non-commercial data; leave the file out"
            )


def licence_of_weights(licences: Iterable[str]) -> str:
    """The licence of weights made from data under these licences: the share-alike one if any, else ours."""
    shared = [licence for licence in licences if "SA" in licence.upper().replace("-", " ").split()]
    return shared[0] if shared else "Apache-2.0"


def read_text(source: Source) -> str:
    """The plain text of a source."""
    text = _read(source.path)
    low, high = (round(len(text) * share) for share in source.part)
    text = text[low:high][: source.limit]
    if not text.strip():
        raise DiscoveryError(f"{source.path}: holds no text")
    return text


def read_prompts(source: Source, columns: tuple[str, ...] = PROMPT_COLUMNS) -> list[str]:
    """The prompts of a json, jsonl, csv, tsv, txt or yaml file, in its order.

    columns  fields to try in order, unless the source names one
    """
    objects = columns != PROMPT_COLUMNS
    columns = columns if source.field is None else (source.field,)
    items = _items(source)
    for where, item in items:
        if objects and not isinstance(item, dict):
            raise DiscoveryError(f"{where} must be an object with any of {columns}")
    return [_prompt(item, where, columns) for where, item in items]


def read_conversations(source: Source) -> list[Prompt]:
    """As `read_prompts`; with ``turns``, whole conversations up to their last user turn."""
    columns = PROMPT_COLUMNS if source.field is None else (source.field,)
    prompts: list[Prompt] = []
    for where, item in _items(source):
        turns = item.get("conversation") if source.turns and isinstance(item, dict) else None
        prompts.append(_turns(turns, where) if turns else _prompt(item, where, columns))
    return prompts


def _turns(turns: Any, where: str) -> Prompt:
    allowed = ("system", "user", "assistant")
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and turn.get("role") in allowed and isinstance(turn.get("content"), str)
        for turn in turns
    ):
        raise DiscoveryError(f"{where}.conversation must be a list of objects with role and content")
    kept = [(turn["role"], turn["content"]) for turn in turns]
    while kept and kept[-1][0] != "user":
        kept.pop()
    if not kept:
        raise DiscoveryError(f"{where}.conversation has no user turn")
    return tuple(kept)


def _items(source: Source) -> list[tuple[str, Any]]:
    """The entries of a file that the source uses, each with its place in the file."""
    path, suffix = source.path, source.path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        _read(path)
        items = read_yaml(path, DiscoveryError).data
    else:
        items = _parse(path, suffix, _read(path))
    if isinstance(items, dict):
        lists = [value for value in items.values() if isinstance(value, list)]
        chosen = items.get(source.name)
        items = chosen if isinstance(chosen, list) else lists[0] if len(lists) == 1 else None
    if not isinstance(items, list):
        raise DiscoveryError(f"{path}: must hold a list of prompts (of strings, or of objects with a prompt)")
    placed = [(f"{path}: [{index}]", item) for index, item in enumerate(items)]
    for name, values in source.where:
        for place, item in placed:
            if not isinstance(item, dict) or name not in item:
                raise DiscoveryError(f"{place} has no field {name!r}, which 'where' names")
        placed = [(place, item) for place, item in placed if str(item[name]) in values]
    if source.part != (0.0, 1.0) or source.limit is not None:
        random.Random(path.name).shuffle(placed)  # noqa: S311 (an order, no secret)
        low, high = (round(len(placed) * share) for share in source.part)
        placed = placed[low:high][: source.limit]
    if not placed:
        chosen = f"part {source.part}, limit {source.limit}, where {dict(source.where)}"
        raise DiscoveryError(f"{path}: holds no prompts ({chosen})")
    return placed


def _parse(path: Path, suffix: str, text: str) -> Any:
    try:
        if suffix == ".json":
            return json.loads(text)
        if suffix == ".jsonl":
            # Not splitlines: a JSON text may hold U+2028, which is no end of a line there.
            return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise DiscoveryError(f"{path}: not valid {suffix[1:].upper()} ({error})") from error
    if suffix in (".csv", ".tsv"):
        return list(csv.DictReader(io.StringIO(text), delimiter="\t" if suffix == ".tsv" else ","))
    if suffix == ".txt":
        return [line for line in text.splitlines() if line.strip()]
    raise DiscoveryError(
        f"{path}: ends in {suffix!r}, but prompts are read from json, jsonl, csv, tsv, txt, yaml"
    )


def _prompt(item: Any, where: str, columns: tuple[str, ...] = PROMPT_COLUMNS) -> str:
    if isinstance(item, dict):
        found: Sequence[Any] = [item[column] for column in columns if item.get(column)]
        if not found:
            raise DiscoveryError(f"{where} has {sorted(map(str, item))}, but none of {columns}")
        item = found[0]
    if not isinstance(item, str) or not item.strip():
        raise DiscoveryError(f"{where} = {item!r}, but a prompt is text that is not empty")
    return item


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise DiscoveryError(f"{path}: is larger than {MAX_BYTES} bytes; split it")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise DiscoveryError(f"{path}: cannot be read ({error.strerror}); name an existing file") from error
    except UnicodeDecodeError as error:
        raise DiscoveryError(f"{path}: is not UTF-8 (byte {error.start}); convert it") from error
