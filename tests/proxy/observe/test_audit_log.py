"""The audit log: tampering is detected, nothing happens without a record, and nothing private is recorded."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from fake_engine import FakeEngine
from running_gateway import Start
from typer.testing import CliRunner

from interpretops.errors import ConfigError
from interpretops.records.audit_chain import (
    GENESIS,
    Head,
    head_line,
    head_path,
    log_files,
    make_line,
    read_head,
    verify,
)
from interpretops.settings import AuditSettings
from mechctl.main import app
from proxy.errors import AuditUnavailable
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics

LOG = structlog.wrap_logger(None, processors=[structlog.testing.LogCapture()])


def open_log(path: Path, **settings: int) -> AuditLog:
    return AuditLog(path, AuditSettings(path=path, **settings), Metrics(), LOG)


async def write(path: Path, records: int, **settings: int) -> None:
    log = open_log(path, **settings)
    for index in range(records):
        log.append("request", request_id=f"r{index}", status=200)
    await log.close()


@pytest.fixture
async def log(tmp_path: Path) -> Path:
    """A log of nine records."""
    path = tmp_path / "audit.jsonl"
    await write(path, 9)
    return path


async def test_intact_log_is_verified(log: Path) -> None:
    """A written log verifies as intact, across a restart, by library and command line."""
    await write(log, 3)
    found = verify(log)
    assert (found.intact, found.records, found.first, found.last.seq) == (True, 12, 1, 12)
    ended = CliRunner().invoke(app, ["audit", "verify", str(log)])
    assert ended.exit_code == 0
    assert "12 records, 1 to 12, are unchanged" in ended.stdout


def forged(lines: list[bytes], seq: int, prev: str | None = None) -> bytes:
    line, _ = make_line(seq, prev or json.loads(lines[seq - 2])["hash"], "t", "request", {"status": 200})
    return line


@pytest.mark.parametrize(
    ("spoil", "line", "got"),
    [
        (lambda rows: [*rows[:4], rows[4].replace(b"200", b"500"), *rows[5:]], 5, "was changed"),
        (lambda rows: [*rows[:4], rows[4].replace(b":", b": ", 1), *rows[5:]], 5, "was changed"),
        (lambda rows: [*rows[:4], b"not json\n", *rows[5:]], 5, "was changed"),
        (lambda rows: [*rows[:4], *rows[5:]], 5, "record 5 was removed before record 6"),
        (lambda rows: [*rows[:2], *rows[5:]], 3, "records 3 to 5 were removed before record 6"),
        (lambda rows: [*rows[:4], rows[2], *rows[4:]], 5, "record 3 was inserted"),
        (lambda rows: [*rows[:4], forged(rows, 5), *rows[4:]], 6, "record 5 was inserted"),
        (lambda rows: [*rows[:4], forged(rows, 5), *rows[5:]], 6, "does not follow the record before"),
        (lambda rows: [*rows[:4], rows[5], rows[4], *rows[6:]], 5, "record 5 was removed"),
        (lambda rows: rows[1:], 1, "record 1 was removed before record 2"),
    ],
)
async def test_altered_line_is_reported(log: Path, spoil: Callable[..., Any], line: int, got: str) -> None:
    """A line that was changed, removed, inserted, forged or swapped is reported with file and line."""
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(spoil(rows)))
    found = verify(log)
    assert not found.intact
    assert found.faults[0].startswith(f"{log}:{line}: ")
    assert got in found.faults[0]
    ended = CliRunner().invoke(app, ["audit", "verify", str(log)])
    assert (ended.exit_code, ended.stdout.splitlines()[0]) == (1, found.faults[0])


async def test_truncated_log_is_reported_and_not_continued(log: Path) -> None:
    """A truncated log is not intact, and no gateway continues it."""
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(rows[:6]))
    assert verify(log).faults == [f"{log}: was truncated: ends with record 6, but 9 had been written"]
    with pytest.raises(ConfigError, match="truncated before record 9"):
        open_log(log)
    log.unlink()
    assert not verify(log).intact
    with pytest.raises(ConfigError, match=r"files are missing.*move \S+\.head away too"):
        open_log(log)
    # What the message tells to do is enough.
    head_path(log).unlink()
    await write(log, 2)
    assert verify(log).intact


async def test_log_without_its_head_is_not_intact(log: Path) -> None:
    """Without the head file a truncated end would not show, so its absence is a fault."""
    head_path(log).unlink()
    assert "is missing or unreadable" in verify(log).faults[0]
    head_path(log).write_text(json.dumps({"seq": 9, "hash": "0" * 64}))
    assert "names record 9 with another hash" in verify(log).faults[0]


@pytest.mark.parametrize("kept_rows", [9, 6, 0])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda head: head.unlink(),
        lambda head: head.write_text("garbage"),
        lambda head: head.write_text(""),
        lambda head: head.write_text('{"seq": "000000000000006", "hash": "x"}'),
    ],
)
async def test_log_without_its_readable_head_is_not_continued(
    log: Path, spoil: Callable[..., Any], kept_rows: int
) -> None:
    """Continuing would store a new head and hide a truncated end. So start-up is refused, with the remedy,
    whether or not lines are missing. A new log starts only if log and head file are both empty."""
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(rows[:kept_rows]))
    spoil(head_path(log))
    assert not verify(log).intact
    holds_nothing = kept_rows == 0 and not (head_path(log).exists() and head_path(log).read_bytes())
    if holds_nothing:
        await open_log(log).close()
        return
    with pytest.raises(ConfigError, match=r"is missing or unreadable.*verify \S+ --head SEQ:HASH.*away"):
        open_log(log)
    assert log.read_bytes() == b"".join(rows[:kept_rows])
    ended = CliRunner().invoke(app, ["audit", "verify", str(log)])
    assert ended.exit_code == 1
    # What the message tells to do is enough.
    log.rename(log.with_suffix(".aside"))
    head_path(log).unlink(missing_ok=True)
    await write(log, 2)
    assert verify(log).intact


async def test_log_of_a_killed_process_can_always_be_continued(tmp_path: Path) -> None:
    """The head file exists before the first record: a process killed at any later moment leaves a log that
    the next one continues, with everything that was written."""
    path = tmp_path / "audit.jsonl"
    killed = open_log(path)
    assert read_head(path) == Head(0, GENESIS)
    killed.append("request", status=200)
    for record in range(2, 5):
        abandon(killed)
        assert verify(path).intact
        killed = open_log(path)
        killed.append("request", status=200)
        assert killed.head.seq == record
    await killed.sync()
    killed.append("request", status=200)
    abandon(killed)
    await write(path, 1)
    assert (verify(path).intact, verify(path).records) == (True, 6)


def abandon(log: Path) -> None:
    """End like a killed process: flush nothing, release all locks."""
    os.close(log._file.descriptor)
    log._note.close()
    log._lock.close()


@pytest.mark.parametrize("cut", [6, 9])
async def test_replaced_lines_are_detected_and_not_continued(log: Path, cut: int) -> None:
    """A forged end with the right number of records is detected by the stored hash, and changes after the
    stored head by the chain."""
    rows = log.read_bytes().splitlines(keepends=True)[:cut]
    for seq in range(cut + 1, 13):
        rows.append(forged(rows, seq, prev=None if cut == 6 or seq != 11 else "0" * 64))
    log.write_bytes(b"".join(rows))
    got = "record 9 is missing or differs" if cut == 6 else "record 11 does not follow"
    with pytest.raises(ConfigError, match=got):
        open_log(log)
    assert not verify(log).intact


async def test_head_kept_elsewhere_proves_what_the_files_cannot(log: Path) -> None:
    """Someone with all files can truncate the log and store another head. A head kept elsewhere reveals it,
    by library and command line. A matching head passes, and replaces a lost head file."""
    rows = log.read_bytes().splitlines(keepends=True)
    kept = Head(9, json.loads(rows[8])["hash"])

    def command(head: str) -> tuple[int, str]:
        ended = CliRunner().invoke(app, ["audit", "verify", str(log), "--head", head])
        return ended.exit_code, ended.stdout

    assert command(f"9:{kept.hash}")[0] == 0
    assert command(f"6:{json.loads(rows[5])['hash']}")[0] == 0
    assert "does not have the hash of the head kept elsewhere" in command(f"8:{kept.hash}")[1]
    head_path(log).unlink()
    status, got = command(f"9:{kept.hash}")
    assert (status, "the head kept elsewhere replaces it" in got) == (0, True)
    assert command(f"6:{json.loads(rows[5])['hash']}")[0] == 1
    log.write_bytes(b"".join(rows[:6]))
    head_path(log).write_bytes(head_line(Head(6, json.loads(rows[5])["hash"])))
    assert verify(log).intact
    assert verify(log, kept=kept).faults == [
        f"{log}: was truncated: ends with record 6, but the head kept elsewhere is record 9"
    ]
    assert command(f"9:{kept.hash}")[0] == 1
    assert verify(log, first=12, kept=kept).faults[-1].endswith("comes before --first 12")
    for wrong in ("9", "x:" + kept.hash, "9:abc"):
        ended = CliRunner().invoke(app, ["audit", "verify", str(log), "--head", wrong])
        assert ended.exit_code != 0


async def test_chain_continues_in_the_next_file(tmp_path: Path) -> None:
    """Full files are rotated; all are verified as one log, and a missing one is noticed."""
    path = tmp_path / "audit.jsonl"
    await write(path, 100, rotate_bytes=4096)
    files = log_files(path)
    assert len(files) > 3
    assert all(file.stat().st_size <= 4096 for file in files)
    found = verify(path)
    assert (found.intact, found.records) == (True, 100)
    first_of_second = json.loads(files[1].read_bytes().splitlines()[0])["seq"]
    files[0].unlink()
    assert f"records 1 to {first_of_second - 1} were removed" in verify(path).faults[0]
    assert verify(path, first=first_of_second).intact
    files[2].unlink()
    assert len(verify(path, first=first_of_second).faults) == 1


async def test_line_truncated_by_a_crash_is_reported(log: Path) -> None:
    """A partial last line stays in place, and the next record reports it."""
    with log.open("ab") as file:
        file.write(b'{"seq":10,"prev":"')
    await write(log, 1)
    found = verify(log)
    assert (found.intact, found.records) == (True, 11)
    assert found.notes == [f"{log}:10: was truncated by a crash, and recorded as such"]


async def test_only_one_gateway_may_write(log: Path) -> None:
    """A second writer of the same log is refused at start-up."""
    first = open_log(log)
    with pytest.raises(ConfigError, match="another gateway writes"):
        open_log(log)
    await first.close()


def displaced(metrics: Metrics, how: str) -> float:
    return metrics.registry.get_sample_value("interpretops_audit_displaced_total", {"file": how})


class Written:
    """A log being written, with its metrics and log lines."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.path, self.metrics, capture = path, Metrics(), structlog.testing.LogCapture()
        self.got = capture.entries
        log = structlog.wrap_logger(None, processors=[capture])
        self.audit = AuditLog(path, AuditSettings(path=path, **settings), self.metrics, log)

    def append(self, records: int = 1) -> None:
        for _ in range(records):
            self.audit.append("request", status=200)

    def events(self, path: Path | None = None) -> list[str]:
        return [json.loads(line)["event"] for line in (path or self.path).read_text().splitlines()]


@pytest.mark.parametrize("seconds_first", [True, False])
async def test_removed_log_is_noticed_and_the_chain_continues_in_a_new_file(
    tmp_path: Path, seconds_first: bool
) -> None:
    """With or without traffic: the new file's first record names the last record before it; the metric counts
    it."""
    log = Written(tmp_path / "audit.jsonl")
    assert displaced(log.metrics, "removed") == 0
    log.append(3)
    before = log.audit.head
    log.path.unlink()
    if seconds_first:
        log.audit.check_files()
        assert log.events() == ["log_continued"]
    log.append(2)
    assert log.events() == ["log_continued", "request", "request"]
    first = json.loads(log.path.read_text().splitlines()[0])
    assert (first["seq"], first["prev"], first["previous_file"]) == (4, before.hash, "removed")
    assert (first["previous_seq"], first["previous_hash"]) == (3, before.hash)
    assert displaced(log.metrics, "removed") == 1
    assert [entry["log_level"] for entry in log.got if entry["event"] == "audit_log_displaced"] == ["error"]
    await log.audit.close()
    assert "records 1 to 3 were removed before record 4" in verify(log.path).faults[0]
    assert verify(log.path, first=4).intact
    await write(log.path, 1)
    assert verify(log.path, first=4).intact


@pytest.mark.parametrize("made_anew", [False, True])
@pytest.mark.parametrize("name", ["audit.jsonl.1", "audit.jsonl-20261130"])
async def test_log_is_rotated_by_another_program(tmp_path: Path, name: str, made_anew: bool) -> None:
    """Renamed as logrotate does, with or without an empty new file: nothing is lost or refused, and
    verification and the next start succeed."""
    log = Written(tmp_path / "audit.jsonl")
    log.append(3)
    log.path.rename(tmp_path / name)
    if made_anew:
        log.path.touch()
    log.append(2)
    assert log.events(tmp_path / name) == ["request"] * 3
    assert log.events() == ["log_continued", "request", "request"]
    assert (displaced(log.metrics, "renamed"), displaced(log.metrics, "removed")) == (1, 0)
    await log.audit.close()
    found = verify(log.path)
    assert (found.intact, found.records) == (True, 6)
    # While no gateway runs.
    log.path.rename(tmp_path / f"{name}2")
    await write(log.path, 1)
    found = verify(log.path)
    assert (found.intact, found.records) == (True, 7)
    (tmp_path / "audit.jsonl.3").write_bytes((tmp_path / name).read_bytes())
    assert verify(log.path).intact, "a copy adds nothing"


async def test_log_moved_elsewhere_is_verified_by_naming_both(tmp_path: Path) -> None:
    """In any order. Without the older file, the fault says so."""
    log = Written(tmp_path / "audit.jsonl")
    log.append(3)
    (tmp_path / "kept").mkdir()
    archived = log.path.rename(tmp_path / "kept" / "old.jsonl")
    log.append()
    await log.audit.close()
    run = CliRunner().invoke
    alone = run(app, ["audit", "verify", str(log.path)])
    assert alone.exit_code == 1
    assert "name the rotated files as well, or give --first" in alone.stdout
    for order in ([log.path, archived], [archived, log.path]):
        ended = run(app, ["audit", "verify", *map(str, order)])
        assert (ended.exit_code, "5 records, 1 to 5, are unchanged" in ended.stdout) == (0, True), (
            ended.stdout
        )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size - 5),
        lambda path: path.write_bytes(path.read_bytes() + b"not ours"),
    ],
)
async def test_log_changed_by_another_program_is_renamed(tmp_path: Path, spoil: Callable[..., Any]) -> None:
    """Truncated or appended to by another program: we append nothing to it, and verification reports it."""
    log = Written(tmp_path / "audit.jsonl")
    log.append(3)
    spoil(log.path)
    log.append(2)
    assert log.events() == ["log_continued", "request", "request"]
    assert displaced(log.metrics, "altered") == 1
    await log.audit.close()
    assert not verify(log.path).intact
    assert verify(log.path).last.seq == 6


async def test_foreign_file_in_the_logs_place_is_neither_overwritten_nor_appended_to(tmp_path: Path) -> None:
    """It is renamed next to the log."""
    log = Written(tmp_path / "audit.jsonl")
    log.append(3)
    log.path.rename(tmp_path / "audit.jsonl.1")
    log.path.write_text("of somebody else")
    log.append()
    await log.audit.close()
    assert (tmp_path / "audit.jsonl.unknown-000000000004").read_text() == "of somebody else"
    assert (verify(log.path).intact, verify(log.path).records) == (True, 5)


async def test_requests_are_refused_while_the_log_has_no_folder(tmp_path: Path) -> None:
    """While no new file can be created, requests are refused; recording resumes when it can."""
    log = Written(tmp_path / "log" / "audit.jsonl")
    log.append(3)
    (tmp_path / "log").rename(tmp_path / "gone")
    log.audit.check_files()
    log.audit.append("request", status=200)
    assert log.audit.failing == "No such file or directory"
    with pytest.raises(AuditUnavailable):
        log.audit.require()
    (tmp_path / "log").mkdir()
    log.audit.check_files()
    log.append()
    log.audit.require()
    assert log.events() == ["log_continued", "request", "request"]
    assert displaced(log.metrics, "lock") == displaced(log.metrics, "renamed") == 1
    await log.audit.close()
    assert verify(log.path, first=4).intact


@pytest.mark.parametrize(
    "spoil",
    [
        lambda head: head.unlink(),
        lambda head: head.rename(head.with_suffix(".old")),
        lambda head: head.write_text("garbage"),
        lambda head: head.write_bytes(head.read_bytes() + b"}"),
    ],
)
async def test_head_file_is_restored(log: Path, spoil: Callable[..., Any]) -> None:
    """Removed, moved or corrupted while the gateway runs: it is restored within a second, and counted."""
    written = Written(log)
    written.append()
    await written.audit.sync()
    spoil(head_path(log))
    written.audit.check_files()
    assert read_head(log).seq == 10
    assert displaced(written.metrics, "head") == 1
    written.audit.check_files()
    assert displaced(written.metrics, "head") == 1
    await written.audit.close()
    assert verify(log).intact


async def test_lost_lock_is_retaken_or_writing_stops(log: Path) -> None:
    """Without its lock file a second gateway could write the same log, so this one stops writing."""
    written = Written(log)
    lock = log.with_name(log.name + ".lock")
    lock.unlink()
    written.audit.check_files()
    with pytest.raises(ConfigError, match="another gateway writes"):
        open_log(log)
    lock.unlink()
    other = open_log(log)
    written.audit.check_files()
    assert written.audit.failing == "another gateway writes it"
    written.append()
    assert written.audit.failing
    assert verify(log).records == 9
    await other.close()
    written.audit.check_files()
    written.append()
    assert written.audit.failing is None
    await written.audit.close()
    assert verify(log).intact


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
import structlog
from interpretops.settings import AuditSettings
from proxy.observe.audit_log import AuditLog
from proxy.observe.metrics import Metrics
from proxy.errors import AuditUnavailable

async def main(path, on_failure):
    metrics = Metrics()
    log = AuditLog(path, AuditSettings(path=path, on_failure=on_failure), metrics, structlog.get_logger())
    log.append("request", status=200)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, hard))
    log.append("request", status=200)
    assert log.failing and b"interpretops_audit_failing 1.0" in metrics.render()
    try:
        log.require()
        print("served")
    except AuditUnavailable as refused:
        print("refused", refused.status)
    try:
        await log.append_durably("override", by="me")
    except AuditUnavailable:
        print("not done")
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    log.append("request", status=200)
    log.require()
    assert b"interpretops_audit_failing 0.0" in metrics.render()
    await log.append_durably("override", by="me")
    await log.close()

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


@pytest.mark.parametrize(("on_failure", "got"), [("refuse", "refused 503"), ("continue", "served")])
def test_full_disk(tmp_path: Path, on_failure: str, got: str) -> None:
    """While nothing can be written, requests are refused or served as set, no record is lost, and the chain
    holds."""
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, "-c", FULL_DISK, str(path), on_failure]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert got in ended.stdout
    assert "not done" in ended.stdout
    found = verify(path)
    assert (found.intact, found.records) == (True, 4)


async def test_requests_are_recorded_without_their_content(
    start: Start, engine: FakeEngine, tmp_path: Path
) -> None:
    """Each request's caller, policy, revision and outcome are recorded; no prompt, answer or key is."""
    path = tmp_path / "log" / "audit.jsonl"
    front = await start("calm", **{"audit.path": path})
    secret = "canary-7c1d"
    messages = [{"role": "user", "content": secret}]
    _, headers, _ = await front.chat(messages=messages, model="tiny-model+calm")
    await front.chat(messages=messages, stream=True, headers={"Authorization": f"Bearer {secret}"})
    await front.chat(messages=messages, unknown=secret)
    async with front.admin.get("/admin/audit") as answer:
        got = await answer.json()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["event"] for record in records] == ["gateway_started", "policy_active", *["request"] * 3]
    first = records[2]
    assert first["request_id"] == headers["X-Request-Id"]
    assert (first["tenant"], first["policy"], first["status"]) == ("anonymous", "calm", 200)
    assert f"calm@{first['revision'][:12]}" == headers["X-Steering-Policy"]
    assert first["tokens"] == 3
    assert (records[4]["status"], records[4]["reason"]) == (400, "field_not_allowed")
    assert secret not in path.read_text()
    assert (got["records"], got["hash"], got["failing"]) == (5, records[-1]["hash"], None)


async def test_no_answer_goes_unrecorded_when_the_log_is_removed(start: Start, tmp_path: Path) -> None:
    """The next request goes to a new file, after a record that explains it; the metric exists beforehand."""
    path = tmp_path / "audit.jsonl"
    front = await start("calm", **{"audit.path": path})
    metrics = front.apps.gateway.metrics
    assert displaced(metrics, "removed") == 0
    path.unlink()
    status, headers, _ = await front.chat(model="tiny-model+calm")
    first, *_, last = [json.loads(line) for line in path.read_text().splitlines()]
    assert (status, first["event"], first["previous_file"]) == (200, "log_continued", "removed")
    assert last["request_id"] == headers["X-Request-Id"]
    assert displaced(metrics, "removed") == 1


async def test_request_that_could_not_be_recorded_is_refused(
    start: Start, engine: FakeEngine, tmp_path: Path
) -> None:
    """While the log fails, no request reaches the engine."""
    front = await start("calm", **{"audit.path": tmp_path / "audit.jsonl"})
    front.apps.gateway.audit.failing = "No space left on device"
    status, headers, body = await front.chat()
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "audit_unavailable", "1")
    assert engine.seen == []
