"""The audit log: nothing is taken from it unseen, nothing happens without it, it tells nothing private."""

import json
import subprocess
import sys

import pytest
import structlog
from typer.testing import CliRunner

from interpretops.audit_chain import head_path, log_files, make_line, verify
from interpretops.cli import app
from interpretops.errors import ConfigError
from interpretops.settings import AuditSettings
from proxy.audit import AuditLog
from proxy.metrics import Metrics

LOG = structlog.wrap_logger(None, processors=[structlog.testing.LogCapture()])


def open_log(path, **settings):
    return AuditLog(path, AuditSettings(path=path, **settings), Metrics(), LOG)


async def write(path, records, **settings):
    log = open_log(path, **settings)
    for index in range(records):
        log.append("request", request_id=f"r{index}", status=200)
    await log.close()


@pytest.fixture
async def log(tmp_path):
    """A log of nine records."""
    path = tmp_path / "audit.jsonl"
    await write(path, 9)
    return path


async def test_log_is_verified_whole(log):
    """What was written is found intact, across a restart, by library and command line."""
    await write(log, 3)
    found = verify(log)
    assert (found.intact, found.records, found.first, found.last.seq) == (True, 12, 1, 12)
    ended = CliRunner().invoke(app, ["audit", "verify", str(log)])
    assert ended.exit_code == 0
    assert "12 records, 1 to 12, are as they were written" in ended.stdout


def forged(lines, seq, prev=None):
    line, _ = make_line(seq, prev or json.loads(lines[seq - 2])["hash"], "t", "request", {"status": 200})
    return line


@pytest.mark.parametrize(
    ("spoil", "line", "told"),
    [
        (lambda rows: [*rows[:4], rows[4].replace(b"200", b"500"), *rows[5:]], 5, "was changed"),
        (lambda rows: [*rows[:4], rows[4].replace(b":", b": ", 1), *rows[5:]], 5, "was changed"),
        (lambda rows: [*rows[:4], b"not json\n", *rows[5:]], 5, "was changed"),
        (lambda rows: [*rows[:4], *rows[5:]], 5, "record 5 was removed before record 6"),
        (lambda rows: [*rows[:2], *rows[5:]], 3, "records 3 to 5 were removed before record 6"),
        (lambda rows: [*rows[:4], rows[2], *rows[4:]], 5, "record 3 was inserted"),
        (lambda rows: [*rows[:4], forged(rows, 5), *rows[4:]], 6, "record 5 was inserted"),
        (lambda rows: [*rows[:4], forged(rows, 5), *rows[5:]], 6, "does not follow what stands before"),
        (lambda rows: [*rows[:4], rows[5], rows[4], *rows[6:]], 5, "record 5 was removed"),
        (lambda rows: rows[1:], 1, "record 1 was removed before record 2"),
    ],
)
async def test_spoiled_line_is_named(log, spoil, line, told):
    """A line that was changed, removed, inserted, forged or exchanged is named with file and line."""
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(spoil(rows)))
    found = verify(log)
    assert not found.intact
    assert found.faults[0].startswith(f"{log}:{line}: ")
    assert told in found.faults[0]
    ended = CliRunner().invoke(app, ["audit", "verify", str(log)])
    assert (ended.exit_code, ended.stdout.splitlines()[0]) == (1, found.faults[0])


async def test_log_that_was_cut_off_is_named_and_not_continued(log):
    """Without its last lines a log is not whole, and no gateway writes on as if it were."""
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(rows[:6]))
    assert verify(log).faults == [f"{log}: was cut off: ends with record 6, but 9 had been written"]
    with pytest.raises(ConfigError, match="cut off before record 9"):
        open_log(log)
    log.unlink()
    assert not verify(log).intact
    with pytest.raises(ConfigError, match="cut off before record 9"):
        open_log(log)


async def test_log_without_its_head_is_not_called_whole(log):
    """Who removes the note of the newest record hides a cut-off end, so that is a fault."""
    head_path(log).unlink()
    assert "is missing or unreadable" in verify(log).faults[0]
    head_path(log).write_text(json.dumps({"seq": 9, "hash": "0" * 64}))
    assert "names record 9 with another hash" in verify(log).faults[0]


async def test_chain_goes_on_in_the_next_file(tmp_path):
    """Full files are set aside; all of them are verified as one, and one that is gone is missed."""
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


async def test_line_broken_off_by_a_crash_is_told_not_hidden(log):
    """Half a last line stays where it is, and the next record says that it was found."""
    with log.open("ab") as file:
        file.write(b'{"seq":10,"prev":"')
    await write(log, 1)
    found = verify(log)
    assert (found.intact, found.records) == (True, 11)
    assert found.notes == [f"{log}:10: was broken off by a crash, and recorded as such"]


async def test_one_gateway_alone_writes(log):
    """A second writer of the same log is refused at its start."""
    first = open_log(log)
    with pytest.raises(ConfigError, match="another gateway writes"):
        open_log(log)
    await first.close()


FULL_DISK = """
import asyncio, resource, sys
from pathlib import Path
import structlog
from interpretops.settings import AuditSettings
from proxy.audit import AuditLog
from proxy.metrics import Metrics
from proxy.refusal import AuditUnavailable

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


@pytest.mark.parametrize(("on_failure", "told"), [("refuse", "refused 503"), ("continue", "served")])
def test_full_disk(tmp_path, on_failure, told):
    """When no line can be written requests are refused or served as set, nothing is lost, the chain holds."""
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, "-c", FULL_DISK, str(path), on_failure]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert told in ended.stdout
    assert "not done" in ended.stdout
    found = verify(path)
    assert (found.intact, found.records) == (True, 4)


async def test_requests_are_recorded_and_nothing_of_what_they_said(start, engine, tmp_path):
    """Each request's caller, policy, revision and outcome stand in the log; no prompt, answer or key does."""
    path = tmp_path / "log" / "audit.jsonl"
    front = await start("calm", **{"audit.path": path})
    secret = "canary-7c1d"
    messages = [{"role": "user", "content": secret}]
    _, headers, _ = await front.chat(messages=messages, model="tiny-model+calm")
    await front.chat(messages=messages, stream=True, headers={"Authorization": f"Bearer {secret}"})
    await front.chat(messages=messages, unknown=secret)
    async with front.admin.get("/admin/audit") as answer:
        told = await answer.json()
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["event"] for record in records] == ["gateway_started", "policy_active", *["request"] * 3]
    first = records[2]
    assert first["request_id"] == headers["X-Request-Id"]
    assert (first["tenant"], first["policy"], first["status"]) == ("anonymous", "calm", 200)
    assert f"calm@{first['revision'][:12]}" == headers["X-Steering-Policy"]
    assert first["tokens"] == 3
    assert (records[4]["status"], records[4]["reason"]) == (400, "field_not_allowed")
    assert secret not in path.read_text()
    assert (told["records"], told["hash"], told["failing"]) == (5, records[-1]["hash"], None)


async def test_request_that_could_not_be_recorded_is_refused(start, engine, tmp_path):
    """While the log fails nobody is served, and no request reaches the engine."""
    front = await start("calm", **{"audit.path": tmp_path / "audit.jsonl"})
    front.apps.gateway.audit.failing = "No space left on device"
    status, headers, body = await front.chat()
    assert (status, body["error"]["code"], headers["Retry-After"]) == (503, "audit_unavailable", "1")
    assert engine.seen == []
