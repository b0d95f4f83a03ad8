"""Reading suites: their files from disk or from anywhere fsspec reads, each row as a prompt of its role."""

import hashlib
import random
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from discovery.data.sources import (
    ANSWER_COLUMNS,
    PROMPT_COLUMNS,
    Source,
    read_prompts,
    read_text,
    sha256_of_file,
)
from discovery.errors import DiscoveryError
from discovery.evaluation.suites.remote_file import fetch
from discovery.evaluation.suites.suite import EvaluationSuite, LoadedSuite, Prompt, Role, SuiteSource
from discovery.evaluation.suites.suite_list import SuiteList
from interpretops.files.schema_faults import describe_faults
from interpretops.files.strict_yaml import read_yaml

MAX_BYTES = 2**28
PIECE_CHARACTERS = 1000
WRONG_OPTIONS = 3
"""Wrong options of a factual question that brings none of its own."""
_URL = re.compile(r"[a-z][a-z0-9+.-]*://")


def load_suites(
    path: Path, data_folder: str | None = None, s3_endpoint: str | None = None
) -> list[LoadedSuite]:
    """Read a suite, or a file of several, and their files. Raises `DiscoveryError`, one line per fault."""
    document = read_yaml(path, DiscoveryError)
    many = isinstance(document.data, dict) and "suites" in document.data
    form: type[SuiteList] | type[EvaluationSuite] = SuiteList if many else EvaluationSuite
    try:
        read = form.model_validate(document.data)
        suites = [listed.suite() for listed in read.suites] if isinstance(read, SuiteList) else [read]
    except ValidationError as error:
        raise DiscoveryError("\n".join(describe_faults(error, document, form))) from error
    return [_load(suite, path, data_folder, s3_endpoint) for suite in suites]


def load_suite(path: Path, data_folder: str | None = None) -> LoadedSuite:
    """As `load_suites`, several as one."""
    return join_suites(load_suites(path, data_folder))


def _load(
    suite: EvaluationSuite, path: Path, data_folder: str | None, s3_endpoint: str | None
) -> LoadedSuite:
    prompts: list[Prompt] = []
    hashes = {}
    for source in suite.sources:
        with local_copy(source.path, path.parent, data_folder, s3_endpoint) as file:
            hashes[source.label] = sha256_of_file(file)
            prompts += _prompts(source, file, suite.name)
    return LoadedSuite(suite, sha256_of_file(path), tuple(prompts), hashes, (suite,))


def join_suites(suites: Sequence[LoadedSuite]) -> LoadedSuite:
    """Several suites as one: what a card is of when a policy names several.

    A prompt that two of them have in the same role is taken once. Context and system prompt are the first's.
    """
    if len(suites) == 1:
        return suites[0]
    prompts: list[Prompt] = []
    hashes: dict[str, str] = {}
    seen: set[tuple[Role, str]] = set()
    for loaded in suites:
        own = {label for label in loaded.hashes if label in hashes}
        for prompt in loaded.prompts:
            if (prompt.role, prompt.text) in seen:
                continue
            label = f"{loaded.suite.name}.{prompt.source}"[:64] if prompt.source in own else prompt.source
            hashes[label] = loaded.hashes[prompt.source]
            prompts.append(replace(prompt, id=f"{loaded.suite.name}/{prompt.id}", source=label))
        seen |= {(prompt.role, prompt.text) for prompt in loaded.prompts}
    name = ".".join(loaded.suite.name for loaded in suites)[:64]
    joined = hashlib.sha256("".join(loaded.sha256 for loaded in suites).encode()).hexdigest()
    first = suites[0].suite
    parts = tuple(part for loaded in suites for part in loaded.parts)
    return LoadedSuite(first.model_copy(update={"name": name}), joined, tuple(prompts), hashes, parts)


def _prompts(source: SuiteSource, file: Path, suite: str) -> list[Prompt]:
    """The rows of one file as prompts."""
    label, role = source.label, source.role
    texts = _text_pieces(source, file) if role == "text" else _column(source, file, source.field)
    if source.template is not None:
        texts = [source.template.replace("{}", text) for text in texts]
    options = _options(source, file, len(texts))
    return [
        Prompt(f"{label}/{index}", role, label, text, source.ask == "chat", suite, options[index])
        for index, text in enumerate(texts)
    ]


def _column(
    source: SuiteSource, file: Path, field: str | None, columns: tuple[str, ...] = PROMPT_COLUMNS
) -> list[str]:
    """One field of each row taken; fields of one file come in the same order."""
    wanted = source.list or source.name or ""
    return read_prompts(
        Source(file, "prompts", source.licence, wanted, source.part, limit=source.limit, field=field), columns
    )


def _text_pieces(source: SuiteSource, file: Path) -> list[str]:
    whole = read_text(Source(file, "text", source.licence, part=source.part))
    pieces = [whole[at : at + PIECE_CHARACTERS].strip() for at in range(0, len(whole), PIECE_CHARACTERS)]
    return [piece for piece in pieces if piece][: source.limit]


def _options(source: SuiteSource, file: Path, count: int) -> list[tuple[str, ...]]:
    """What each prompt is held against: its right answer, its options, or the other sentence."""
    if source.role == "bias":
        return [(text,) for text in _column(source, file, source.against)]
    if source.role not in ("task", "factual"):
        return [()] * count
    right = _column(source, file, source.answer, ANSWER_COLUMNS)
    if source.role == "task":
        return [(text,) for text in right]
    if source.against is None:
        return [(text, *_others(right, index)) for index, text in enumerate(right)]
    wrong = [
        [part.strip() for part in text.split(";") if part.strip()]
        for text in _column(source, file, source.against)
    ]
    return [(text, *parts) for text, parts in zip(right, wrong, strict=True)]


def _others(right: Sequence[str], index: int) -> list[str]:
    """Answers to other questions of the file, the same ones each time."""
    different = sorted({text for text in right if text != right[index]})
    chance = random.Random(f"{index}/{right[index]}")  # noqa: S311 (a choice, no secret)
    return chance.sample(different, min(WRONG_OPTIONS, len(different)))


@contextmanager
def local_copy(
    path: str, beside: Path, data_folder: str | None, s3_endpoint: str | None = None
) -> Iterator[Path]:
    """The file on this disk, for as long as the block runs; its name stays, as it seeds the order."""
    if not _URL.match(path):
        if (beside / path).exists() or data_folder is None:
            yield beside / path
            return
        if not _URL.match(data_folder):
            yield Path(data_folder) / path
            return
    url = path if _URL.match(path) else f"{data_folder}".rstrip("/") + f"/{path}"
    name = PurePosixPath(url.split("?", 1)[0]).name
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / name
        copy.write_bytes(fetch(url, MAX_BYTES, s3_endpoint))
        yield copy
