"""The audit log's format: JSON lines, each holding the hash of the one before; and its verification."""

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
"""What the first record follows."""
_HASH = re.compile(rb',"hash":"([0-9a-f]{64})"}')
_HASH_BYTES: Final = 75
_HEAD = re.compile(r"([0-9]{1,15}):([0-9a-f]{64})")
_HEAD_BYTES: Final = 4096
_MOST_FAULTS: Final = 50


@dataclass(frozen=True)
class Head:
    """The newest record that is known to be on disk."""

    seq: int
    hash: str


def make_line(seq: int, prev: str, time: str, event: str, fields: Mapping[str, Any]) -> tuple[bytes, str]:
    """One line, and its hash, which is that of all bytes before it."""
    record = {"seq": seq, "prev": prev, "time": time, "event": event, **fields}
    body = json.dumps(record, separators=(",", ":"), ensure_ascii=True).encode()[:-1]
    digest = hashlib.sha256(body).hexdigest()
    return body + b',"hash":"' + digest.encode() + b'"}\n', digest


def read_line(line: bytes) -> dict[str, Any] | None:
    """The record of a line without its end; None when it is none, or its hash is not that of its bytes."""
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
    """Where the newest record on disk is noted, so that a log cut off at its end is noticed."""
    return log.with_name(log.name + ".head")


def head_line(head: Head) -> bytes:
    """What stands there; always of the same length."""
    return json.dumps({"seq": f"{head.seq:015d}", "hash": head.hash}).encode() + b"\n"


def read_head(log: Path) -> Head | None:
    """The noted head; None when there is none or it cannot be read."""
    try:
        content = json.loads(read_regular(head_path(log), _HEAD_BYTES))
        return parse_head(f"{int(content['seq'])}:{content['hash']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def parse_head(text: str) -> Head | None:
    """A head written as ``SEQ:HASH``, as `GET /admin/audit` gives number and hash; None when it is none."""
    found = _HEAD.fullmatch(text)
    return None if found is None else Head(int(found[1]), found[2])


def rotated_path(log: Path, first_seq: int) -> Path:
    """Where a full file is set aside."""
    return log.with_name(f"{log.stem}.{first_seq:012d}{log.suffix}")


def log_files(log: Path) -> list[Path]:
    """All files of a log in order, the one being written last.

    Full ones have names of ours. Those that another program set aside beside it, as `audit.jsonl.1` or
    `audit.jsonl-20261130`, are known by their first record.
    """
    own = re.compile(re.escape(log.stem) + r"\.(\d{12})" + re.escape(log.suffix))
    aside = {path: int(found[1]) for path in _beside(log) if (found := own.fullmatch(path.name))}
    if log.exists():
        aside[log] = first_number(log) or sys.maxsize
    other = re.compile(re.escape(log.name) + r"[.-]\d[\d-]*")
    for path in _beside(log):
        number = first_number(path) if other.fullmatch(path.name) else None
        # A copy of what is there already adds nothing.
        if number is not None and number not in aside.values():
            aside.setdefault(path, number)
    return sorted(aside, key=lambda path: (path == log, aside[path]))


def _beside(log: Path) -> list[Path]:
    return sorted(log.parent.glob(f"{glob.escape(log.stem)}*"))


def first_number(path: Path) -> int | None:
    """The number of a file's first record; None when that is none."""
    try:
        with open_regular(path) as file:
            record = read_line(file.readline().rstrip(b"\n"))
    except OSError:
        return None
    return None if record is None else int(record["seq"])


@dataclass
class Verification:
    """What a log was found to be."""

    records: int = 0
    first: int | None = None
    last: Head | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def intact(self) -> bool:
        """Whether nothing was changed, removed, inserted or cut off."""
        return not self.faults and self.records > 0


def verify(log: Path, *, first: int = 1, also: Sequence[Path] = (), kept: Head | None = None) -> Verification:
    """Read a whole log and name every line that is not as it was written.

    first  the number that the log must begin with; later ones after files were archived elsewhere
    also   files of the same log that lie elsewhere, in any order
    kept   a head of the log that was kept elsewhere: up to it nothing can be missing, whoever had the files
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
    """What is wrong with a log from a noted record on: it must be there, and all that follow must follow it.

    Half a line at the end is a crash and no fault. So is a note that is older than the log's end: lines are
    on the disk before they are noted.
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
            # The file with the noted record was moved away by a program that rotates logs.
            lines = chain([placed], lines)
            break
    else:
        if head.seq:
            return [f"record {head.seq} is gone or another than was noted in {head_path(log)}"]
    _check_lines(found, lines, head.seq + 1, head.hash, set())
    return found.faults


def _check_lines(
    found: Verification,
    lines: Iterable[tuple[str, bytes]],
    expected: int,
    prev: str | None,
    heads: Collection[Head | None],
) -> set[Head]:
    """Check lines of which the first must have the number ``expected``; those of ``heads`` that are there."""
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
                found.notes.append(f"{torn[0]}: was broken off by a crash, and recorded as such")
            else:
                found.faults.append(f"{torn[0]}: was changed: its hash is not that of its content")
                # The record that stood there is accounted for; what follows it cannot name its hash any more.
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
        found.faults.append(f"{torn[0]}: was changed or broken off: its hash is not that of its content")
    return seen


def _check_place(
    found: Verification, place: str, record: Mapping[str, Any], expected: int, prev: str | None
) -> None:
    seq = record["seq"]
    if seq < expected:
        found.faults.append(
            f"{place}: record {seq} was inserted or stands here again; {expected} should follow"
        )
    elif seq > expected:
        missing = f"record {expected} was" if seq == expected + 1 else f"records {expected} to {seq - 1} were"
        more = "; name the files that were set aside as well, or give --first" if found.first is None else ""
        found.faults.append(f"{place}: {missing} removed before record {seq}{more}")
    elif prev is not None and record["prev"] != prev:
        found.faults.append(f"{place}: record {seq} does not follow what stands before it: one was exchanged")


def _check_kept(found: Verification, log: Path, kept: Head, first: int, *, seen: bool) -> None:
    if seen:
        return
    if kept.seq < first:
        found.faults.append(f"record {kept.seq}, whose hash was given, lies before --first {first}")
    elif found.last is None or kept.seq > found.last.seq:
        end = "holds no records" if found.last is None else f"ends with record {found.last.seq}"
        found.faults.append(f"{log}: was cut off: {end}, but the head kept elsewhere is of record {kept.seq}")
    else:
        found.faults.append(
            f"{log}: record {kept.seq} has another hash than the head kept elsewhere: it was written anew"
        )


def _check_end(
    found: Verification, log: Path, head: Head | None, kept: Head | None, seen: Collection[Head]
) -> None:
    if found.last is None:
        found.faults.append(f"{log}: holds no records")
    elif head is None and kept in seen and kept == found.last:
        found.notes.append(
            f"{head_path(log)}: is missing or unreadable; the head kept elsewhere stands for it"
        )
    elif head is None:
        found.faults.append(
            f"{head_path(log)}: is missing or unreadable, so a cut-off end would not show; compare with a "
            "head that was kept elsewhere: --head SEQ:HASH"
        )
    elif head.seq == 0 and head.hash == GENESIS:
        found.notes.append(f"{head_path(log)}: notes no record yet")
    elif head.seq > found.last.seq:
        found.faults.append(
            f"{log}: was cut off: ends with record {found.last.seq}, but {head.seq} had been written"
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
