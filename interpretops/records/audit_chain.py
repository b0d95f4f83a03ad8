"""The audit log's format (JSON lines, each with the hash of the line before) and its verification."""

import glob
import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final

from interpretops.files.regular_file import open_regular, read_regular

GENESIS: Final = "0" * 64
"""The previous hash of the first record."""
_HASH = re.compile(rb',"hash":"([0-9a-f]{64})"}')
_HASH_BYTES: Final = 75
_HEAD = re.compile(r"([0-9]{1,15}):([0-9a-f]{64})")
_HEAD_BYTES: Final = 4096
_MOST_FAULTS: Final = 50


@dataclass(frozen=True)
class Head:
    """The newest record known to be on disk."""

    seq: int
    hash: str


def make_line(seq: int, prev: str, time: str, event: str, fields: Mapping[str, Any]) -> tuple[bytes, str]:
    """One line, and its hash, which covers all bytes before it in the line."""
    record = {"seq": seq, "prev": prev, "time": time, "event": event, **fields}
    body = json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode()[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return body + b',"hash":"' + digest.encode() + b'"}\n', digest


def read_line(line: bytes) -> dict[str, Any] | None:
    """The record in a line without its newline; None if it is malformed or its hash is wrong."""
    found = _HASH.fullmatch(line[-_HASH_BYTES:])
    if found is None or hashlib.sha256(line[:-_HASH_BYTES]).hexdigest().encode() != found[1]:
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("seq"), int) and "prev" in record
    return record if whole else None


def head_path(log: Path) -> Path:
    """The file that notes the newest record on disk, so that a truncated log is detected."""
    return log.with_name(log.name + ".head")


def head_line(head: Head) -> bytes:
    """The content of that file; its length never changes."""
    return json.dumps({"seq": f"{head.seq:015d}", "hash": head.hash}).encode() + b"\n"


def read_head(log: Path) -> Head | None:
    """The noted head, or None if it is missing or unreadable."""
    try:
        content = json.loads(read_regular(head_path(log), _HEAD_BYTES))
        return parse_head(f"{int(content['seq'])}:{content['hash']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def parse_head(text: str) -> Head | None:
    """Parse a head written as ``SEQ:HASH``, from the values in `GET /admin/audit`; None if malformed."""
    found = _HEAD.fullmatch(text)
    return None if found is None else Head(int(found[1]), found[2])


def rotated_path(log: Path, first_seq: int) -> Path:
    """The path to which a full file is rotated."""
    return log.with_name(f"{log.stem}.{first_seq:012d}{log.suffix}")


def log_files(log: Path) -> list[Path]:
    """All files of a log in order, the current one last.

    Our own rotated files are recognised by name. Files that another program rotated, such as `audit.jsonl.1`
    or `audit.jsonl-20261130`, are recognised by their first record.
    """
    own = re.compile(re.escape(log.stem) + r"\.(\d{12})" + re.escape(log.suffix))
    aside = {path: int(found[1]) for path in _beside(log) if (found := own.fullmatch(path.name))}
    if log.exists():
        aside[log] = first_number(log) or sys.maxsize
    other = re.compile(re.escape(log.name) + r"[.-]\d[\d-]*")
    for path in _beside(log):
        number = first_number(path) if other.fullmatch(path.name) else None
        # Skip copies of files that are already listed.
        if number is not None and number not in aside.values():
            aside.setdefault(path, number)
    return sorted(aside, key=lambda path: (path == log, aside[path]))


def _beside(log: Path) -> list[Path]:
    return sorted(log.parent.glob(f"{glob.escape(log.stem)}*"))


def first_number(path: Path) -> int | None:
    """The number of a file's first record, or None if that line is not a record."""
    try:
        with open_regular(path) as file:
            record = read_line(file.readline().rstrip(b"\n"))
    except OSError:
        return None
    return None if record is None else int(record["seq"])


@dataclass
class Verification:
    """The result of verifying a log."""

    records: int = 0
    first: int | None = None
    last: Head | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether no record was changed, removed, inserted or truncated."""
        return not self.faults and self.records > 0


def verify(log: Path, *, first: int = 1, also: Sequence[Path] = (), kept: Head | None = None) -> Verification:
    """Read a whole log and report every line that differs from what was written.

    first  the number of the first expected record; above 1 if older files were archived elsewhere
    also   files of the same log in other places, in any order
    kept   a head that was stored elsewhere: it exposes any missing record up to it, even
           if somebody could rewrite the files
    """
    found, head = Verification(), read_head(log)
    seen = _check_lines(
        found, _lines(_in_order(log, also)), first, GENESIS if first == 1 else None, {head, kept}
    )
    if len(found.faults) < _MOST_FAULTS:
        if kept is not None:
            _check_kept(found, log, kept, first, seen=kept in seen)
        _check_end(found, log, head, kept, seen)
    return found


def faults_after(log: Path, head: Head) -> list[str]:
    """Faults in a log from a noted record on: the record must exist, and the chain after it must be intact.

    A partial line at the end comes from a crash and is not a fault. Neither is a note older than the log's
    end, because lines are written to disk before they are noted.
    """
    files = log_files(log)
    since = [path for path in files if 0 < (first_number(path) or 0) <= head.seq][-1:]
    lines = _whole_lines(files[files.index(since[0]) :] if since else files)
    found, near = Verification(), tuple(b'{"seq":%d,' % number for number in (head.seq, head.seq + 1))
    for placed in lines if head.seq else ():
        record = read_line(placed[1].rstrip(b"\n")) if placed[1].startswith(near) else None
        if record is None:
            continue
        if (record["seq"], record["hash"]) == (head.seq, head.hash):
            break
        if (record["seq"], record["prev"]) == (head.seq + 1, head.hash):
            # Another program rotated the file with the noted record.
            lines = chain([placed], lines)
            break
    else:
        if head.seq:
            return [f"record {head.seq} is missing or differs from the one noted in {head_path(log)}"]
    _check_lines(found, lines, head.seq + 1, head.hash, set())
    return found.faults


def _check_lines(
    found: Verification,
    lines: Iterable[tuple[str, bytes]],
    expected: int,
    prev: str | None,
    heads: Collection[Head | None],
) -> set[Head]:
    """Check lines, starting with record number ``expected``; return which of ``heads`` were found."""
    seen: set[Head] = set()
    torn: tuple[str, bytes] | None = None
    for place, line in lines:
        if len(found.faults) >= _MOST_FAULTS:
            found.faults.append("further faults are not listed")
            return seen
        record = read_line(line.rstrip(b"\n"))
        if record is None:
            if torn is not None:
                found.faults.append(f"{torn[0]}: was changed: its hash is not that of its content")
            torn = place, line.rstrip(b"\n")
            continue
        if torn is not None:
            if _tells_of(record, torn[1]):
                found.notes.append(f"{torn[0]}: was truncated by a crash, and recorded as such")
            else:
                found.faults.append(f"{torn[0]}: was changed: its hash is not that of its content")
                # The lost record is accounted for, but the next one cannot name its hash.
                expected, prev = expected + 1, None
            torn = None
        _check_place(found, place, record, expected, prev)
        found.records += 1
        found.first = record["seq"] if found.first is None else found.first
        found.last = Head(record["seq"], line.rstrip(b"\n")[-66:-2].decode())
        if found.last in heads:
            seen.add(found.last)
        expected, prev = max(expected, record["seq"] + 1), found.last.hash
    if torn is not None:
        found.faults.append(f"{torn[0]}: was changed or truncated: its hash is not that of its content")
    return seen


def _check_place(
    found: Verification, place: str, record: Mapping[str, Any], expected: int, prev: str | None
) -> None:
    seq = record["seq"]
    if seq < expected:
        found.faults.append(f"{place}: record {seq} was inserted or repeated; {expected} should follow")
    elif seq > expected:
        missing = f"record {expected} was" if seq == expected + 1 else f"records {expected} to {seq - 1} were"
        more = "; name the rotated files as well, or give --first" if found.first is None else ""
        found.faults.append(f"{place}: {missing} removed before record {seq}{more}")
    elif prev is not None and record["prev"] != prev:
        found.faults.append(f"{place}: record {seq} does not follow the record before it: one was replaced")


def _check_kept(found: Verification, log: Path, kept: Head, first: int, *, seen: bool) -> None:
    if seen:
        return
    if kept.seq < first:
        found.faults.append(f"record {kept.seq}, whose hash was given, comes before --first {first}")
    elif found.last is None or kept.seq > found.last.seq:
        end = "holds no records" if found.last is None else f"ends with record {found.last.seq}"
        found.faults.append(f"{log}: was truncated: {end}, but the head kept elsewhere is record {kept.seq}")
    else:
        found.faults.append(
            f"{log}: record {kept.seq} does not have the hash of the head kept elsewhere: it was rewritten"
        )


def _check_end(
    found: Verification, log: Path, head: Head | None, kept: Head | None, seen: Collection[Head]
) -> None:
    if found.last is None:
        found.faults.append(f"{log}: holds no records")
    elif head is None and kept in seen and kept == found.last:
        found.notes.append(f"{head_path(log)}: is missing or unreadable; the head kept elsewhere replaces it")
    elif head is None:
        found.faults.append(
            f"{head_path(log)}: is missing or unreadable, so truncation would go unnoticed; compare with a "
            "head that was kept elsewhere: --head SEQ:HASH"
        )
    elif head.seq == 0 and head.hash == GENESIS:
        found.notes.append(f"{head_path(log)}: notes no record yet")
    elif head.seq > found.last.seq:
        found.faults.append(
            f"{log}: was truncated: ends with record {found.last.seq}, but {head.seq} had been written"
        )
    elif head not in seen:
        found.faults.append(f"{head_path(log)}: names record {head.seq} with another hash than the log has")


def _tells_of(record: Mapping[str, Any], torn: bytes) -> bool:
    return (
        record.get("event") == "recovered" and record.get("torn_sha256") == hashlib.sha256(torn).hexdigest()
    )


def _in_order(log: Path, also: Sequence[Path]) -> list[Path]:
    files = log_files(log)
    known = {path.resolve() for path in files}
    more = [path for path in also if path.resolve() not in known]
    return sorted([*more, *files], key=lambda path: (path == log, first_number(path) or 0)) if more else files


def _whole_lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    return ((place, line) for place, line in _lines(files) if line.endswith(b"\n"))


def _lines(files: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        with open_regular(path) as file:
            for number, line in enumerate(file, 1):
                yield f"{path}:{number}", line
