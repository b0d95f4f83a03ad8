"""Writes the audit log: who got which revision, who changed what; never what was said."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from interpretops.audit_chain import (
    GENESIS,
    Head,
    head_path,
    log_files,
    make_line,
    read_head,
    read_line,
    rotated_path,
)
from interpretops.errors import ConfigError
from interpretops.settings import AuditSettings
from proxy.file_lock import hold
from proxy.metrics import Metrics
from proxy.readiness import Reason
from proxy.refusal import AuditUnavailable

_SYNC_EVERY_S: Final = 1.0
_MOST_WAITING: Final = 10_000
_TAIL_BYTES: Final = 64 * 1024


class AuditLog:
    """An append-only log that no line can be taken from unseen. One process writes it."""

    def __init__(
        self, path: Path, settings: AuditSettings, metrics: Metrics, log: FilteringBoundLogger
    ) -> None:
        self._path = path.expanduser().absolute()
        self._settings = settings
        self._metrics = metrics
        self._log = log
        self._lock = hold(self._path.with_name(self._path.name + ".lock"), "audit.path")
        self._waiting: deque[tuple[str, str, dict[str, Any]]] = deque()
        """Records that could not be written yet, in order."""
        self._omitted = 0
        self._syncing = asyncio.Lock()
        self._sync_task: asyncio.Task[None] | None = None
        self._synced: Head | None = None
        self._file = -1
        self._size = 0
        self.failing: str | None = None
        """Why the log cannot be written at the moment."""
        try:
            self.head, torn = self._find_end()
            self._first = self._open()
            self._head_file = os.open(head_path(self._path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except (OSError, ConfigError) as error:
            os.close(self._lock)
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"audit.path = {path}, but it cannot be written ({error.strerror})") from error
        if torn:
            os.write(self._file, b"\n")
            self._size += 1
            digest = hashlib.sha256(torn).hexdigest()
            self.append("recovered", torn_bytes=len(torn), torn_sha256=digest)

    def require(self) -> None:
        """Refuse a request that could not be recorded, unless the settings let it pass."""
        if self.failing is not None and self._settings.on_failure == "refuse":
            raise AuditUnavailable("requests cannot be recorded at the moment; try again in a moment")

    def not_ready(self) -> Iterator[Reason]:
        """Why every request is refused: as `require` decides it."""
        if self.failing is not None and self._settings.on_failure == "refuse":
            yield Reason("audit_failing", f"the audit log cannot be written: {self.failing}")

    def append(self, event: str, **fields: Any) -> None:
        """Record something that happened. What cannot be written waits, and makes `failing` true."""
        if len(self._waiting) >= _MOST_WAITING:
            self._omitted += 1
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._waiting.append((now, event, fields))
        self._write_waiting()
        if self._settings.fsync == "always" and (self._sync_task is None or self._sync_task.done()):
            # What is written while it runs is forced out by the look of the next second at the latest.
            self._sync_task = asyncio.create_task(self.sync())

    async def append_durably(self, event: str, **fields: Any) -> None:
        """Record something that may only happen once it is recorded. Raises `AuditUnavailable`."""
        self.append(event, **fields)
        if self.failing is None:
            await self.sync()
        if self.failing is not None:
            # It does not happen, so it must not be told later either.
            if self._waiting and self._waiting[-1][1] == event:
                self._waiting.pop()
            raise AuditUnavailable(
                "the audit log cannot be written, and this must be recorded; nothing was done"
            )

    async def keep(self) -> None:
        """Force lines to the disk as the settings say, and try again what failed, until cancelled."""
        while True:
            await asyncio.sleep(_SYNC_EVERY_S)
            if self._waiting:
                self._write_waiting()
            elif self.failing is not None:
                # What was refused left nothing behind, and only writing tells that it can be done again.
                self.append("audit_recovered", why=self.failing)
            await self.sync()

    async def sync(self) -> None:
        """Force what was written to the disk, then note the head."""
        async with self._syncing:
            head = self.head
            if head is None or head == self._synced:
                return
            try:
                if self._settings.fsync != "never":
                    # A file that was set aside meanwhile was forced out then.
                    descriptor = os.dup(self._file)
                    try:
                        await asyncio.to_thread(os.fsync, descriptor)
                    finally:
                        os.close(descriptor)
                self._note_head(head)
            except OSError as error:
                self._fail(error)
            else:
                if not self._waiting:
                    self._recover()

    async def close(self) -> None:
        """Force everything out; what still cannot be written is lost, and the log says so."""
        self._write_waiting()
        await self.sync()
        if self._waiting:
            self._log.error("audit_records_lost", records=len(self._waiting), why=self.failing)
        for descriptor in (self._file, self._head_file, self._lock):
            os.close(descriptor)

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._write(*self._waiting[0])
                self._waiting.popleft()
            if self._omitted:
                omitted, self._omitted = self._omitted, 0
                self.append("omitted", records=omitted)
        except OSError as error:
            self._fail(error)
            return
        if self.head != self._synced or self.failing is None:
            self._recover()

    def _recover(self) -> None:
        if self.failing is not None:
            self._log.info("audit_recovered")
        self.failing = None
        self._metrics.audit_failing.set(0)

    def _write(self, time: str, event: str, fields: dict[str, Any]) -> None:
        seq, prev = (1, GENESIS) if self.head is None else (self.head.seq + 1, self.head.hash)
        line, digest = make_line(seq, prev, time, event, fields)
        if self._size and self._size + len(line) > self._settings.rotate_bytes:
            self._rotate(seq)
        written = 0
        try:
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            # Half a line must not stay: the next record would follow it.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise
        self._size += len(line)
        self.head = Head(seq, digest)
        self._metrics.audit_records.inc()

    def _rotate(self, next_seq: int) -> None:
        os.fsync(self._file)
        target = rotated_path(self._path, self._first)
        self._path.rename(target)
        try:
            old, self._file = self._file, self._open_file()
        except OSError:
            target.rename(self._path)
            raise
        os.close(old)
        self._size, self._first = 0, next_seq
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _note_head(self, head: Head) -> None:
        """In one small write, in place: the length is always the same."""
        content = json.dumps({"seq": f"{head.seq:015d}", "hash": head.hash}).encode() + b"\n"
        os.pwrite(self._head_file, content, 0)
        if self._settings.fsync == "always":
            os.fsync(self._head_file)
        self._synced = head

    def _fail(self, error: OSError) -> None:
        if self.failing is None:
            self._log.error("audit_failing", error=error.strerror)
        self.failing = error.strerror or type(error).__name__
        self._metrics.audit_failing.set(1)

    def _open_file(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        return os.open(self._path, flags, 0o600)

    def _open(self) -> int:
        """Open the current file; the number of its first record."""
        self._file = self._open_file()
        self._size = os.fstat(self._file).st_size
        with self._path.open("rb") as file:
            record = read_line(file.readline().rstrip(b"\n"))
        return (0 if self.head is None else self.head.seq) + 1 if record is None else int(record["seq"])

    def _find_end(self) -> tuple[Head | None, bytes]:
        """The last whole record, and what a crash left of one after it.

        Raises `ConfigError` when the end is not what was written: a log is not continued over a gap.
        """
        noted, last, torn = read_head(self._path), None, b""
        for path in reversed(log_files(self._path)):
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, size - _TAIL_BYTES))
                *lines, rest = file.read().split(b"\n")
            torn = torn or rest
            if lines:
                record = read_line(lines[-1])
                if record is None:
                    raise ConfigError(_altered(self._path, "its last record was changed"))
                last = Head(record["seq"], record["hash"])
                break
        if noted is not None and (last is None or last.seq < noted.seq):
            raise ConfigError(_altered(self._path, f"it was cut off before record {noted.seq}"))
        return last, torn


def _altered(path: Path, what: str) -> str:
    return f"audit.path = {path}, but {what}; see `mechctl audit verify {path}`, then move the log aside"
