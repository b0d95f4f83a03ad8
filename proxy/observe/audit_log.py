"""Writes the audit log: who got which revision and who changed what; never prompts or answers."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from structlog.typing import FilteringBoundLogger

from interpretops.errors import ConfigError
from interpretops.files.regular_file import open_regular
from interpretops.records.audit_chain import (
    GENESIS,
    Head,
    faults_after,
    head_path,
    log_files,
    make_line,
    read_head,
    read_line,
)
from interpretops.settings import AuditSettings
from proxy.errors import AuditUnavailable
from proxy.observe.audit_file import DISPLACED, Displaced, HeadFile, Lock, LogFile
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Reason
from proxy.observe.supervisor import Supervisor
from proxy.process.off_loop import off_loop

_SYNC_EVERY_S: Final = 1.0
_MAX_WAITING: Final = 10_000
_TAIL_BYTES: Final = 64 * 1024


class AuditLog:
    """An append-only, hash-chained log: removing a line is always detectable. One process writes it."""

    def __init__(
        self,
        path: Path,
        settings: AuditSettings,
        metrics: Metrics,
        log: FilteringBoundLogger,
        supervisor: Supervisor | None = None,
    ) -> None:
        self._path = path.expanduser().absolute()
        self._settings = settings
        self._metrics = metrics
        self._log = log
        for how in DISPLACED:
            metrics.audit_displaced.labels(how)
        self._lock = Lock(self._path)
        self._supervisor = supervisor or Supervisor(metrics, log)
        self._waiting: deque[tuple[str, str, dict[str, Any]]] = deque()
        """Records not yet written, in order."""
        self._omitted = 0
        self._syncing = asyncio.Lock()
        self._sync_task: asyncio.Task[None] | None = None
        self._synced: Head | None = None
        self._unrecorded_displacement: Displaced | None = None
        """What happened to the previous file, until it is recorded."""
        self.failing: str | None = None
        """Why the log cannot be written now; None if it can."""
        try:
            noted = read_head(self._path)
            self.head, torn = self._find_end(noted)
            self._note = HeadFile(self._path, noted)
            self._file = LogFile(self._path, self._next_number)
        except (OSError, ConfigError) as error:
            self._lock.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"audit.path = {path}, but it cannot be written ({error.strerror})") from error
        if torn:
            if self._file.size:
                self._file.append(b"\n")
            digest = hashlib.sha256(torn).hexdigest()
            self.append("recovered", torn_bytes=len(torn), torn_sha256=digest)

    def require(self) -> None:
        """Refuse a request that cannot be recorded, unless the settings allow it."""
        if self.failing is not None and self._settings.on_failure == "refuse":
            raise AuditUnavailable("requests cannot be recorded at the moment; try again in a moment")

    def not_ready(self) -> Iterator[Reason]:
        """Why all requests are refused, as `require` decides."""
        if self.failing is not None and self._settings.on_failure == "refuse":
            yield Reason("audit_failing", f"the audit log cannot be written: {self.failing}")

    def append(self, event: str, **fields: Any) -> None:
        """Record an event. If it cannot be written, it waits and `failing` is set."""
        if len(self._waiting) >= _MAX_WAITING:
            self._omitted += 1
            return
        self._waiting.append((_now(), event, fields))
        self._write_waiting()
        if self._settings.fsync == "always" and (self._sync_task is None or self._sync_task.done()):
            # Records written while it runs are synced within a second by `keep`.
            self._sync_task = self._supervisor.spawn("audit sync", self.sync())

    async def append_durably(self, event: str, **fields: Any) -> None:
        """Record an action before it is done. Raises `AuditUnavailable`; the action must then not happen."""
        self.append(event, **fields)
        if self.failing is None:
            await self.sync()
        if self.failing is not None:
            # The action will not happen, so it must not be recorded later either.
            if self._waiting and self._waiting[-1][1] == event:
                self._waiting.pop()
            raise AuditUnavailable(
                "the audit log cannot be written, and this action must be recorded; nothing was done"
            )

    async def keep(self, alive: Callable[[], None]) -> None:
        """Sync to disk as the settings say, and retry failed writes, until cancelled."""
        while True:
            await asyncio.sleep(_SYNC_EVERY_S)
            self.check_files()
            if self._waiting:
                self._write_waiting()
            elif self.failing is not None:
                # No record is waiting, and only a write shows that writing works again.
                self.append("audit_recovered", why=self.failing)
            await self.sync()
            alive()

    def check_files(self) -> None:
        """Continue in a new file, on the same chain, if another program moved or changed the current one.

        Log rotation programs rename the file. This is noticed within a second, or at once on a reload.
        """
        try:
            if self._lock.heal():
                self._report_displaced("lock")
            if self._note.heal():
                self._report_displaced("head")
            self._continue_if_displaced()
        except OSError as error:
            self._fail(error)

    async def sync(self) -> None:
        """Sync written records to disk, then store the head."""
        async with self._syncing:
            head = self.head
            if head is None or head == self._synced:
                return
            try:
                if self._settings.fsync != "never":
                    # A file that is rotated meanwhile is synced during the rotation.
                    descriptor = os.dup(self._file.descriptor)
                    try:
                        await off_loop(os.fsync, descriptor)
                    finally:
                        os.close(descriptor)
                self._note_head(head)
            except OSError as error:
                self._fail(error)
            else:
                if not self._waiting:
                    self._recover()

    async def close(self) -> None:
        """Write and sync everything. Records that still cannot be written are lost, and this is logged."""
        self._write_waiting()
        await self.sync()
        if self._waiting:
            self._log.error("audit_records_lost", records=len(self._waiting), why=self.failing)
        os.close(self._file.descriptor)
        self._note.close()
        self._lock.close()

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
        self._continue_if_displaced()
        self._write_record(time, event, fields)

    def _write_record(self, time: str, event: str, fields: dict[str, Any]) -> None:
        seq, prev = self._next_number, GENESIS if self.head is None else self.head.hash
        line, digest = make_line(seq, prev, time, event, fields)
        if self._file.size and self._file.size + len(line) > self._settings.rotate_bytes:
            self._file = self._file.next(seq)
        self._file.append(line)
        self.head = Head(seq, digest)
        self._metrics.audit_records.inc()

    def _continue_if_displaced(self) -> None:
        self._lock.require()
        how = self._file.displaced()
        if how is not None:
            self._file = self._file.next(self._next_number)
            self._unrecorded_displacement = how
            self._report_displaced(how)
        if self._unrecorded_displacement is not None:
            previous = (
                {} if self.head is None else {"previous_seq": self.head.seq, "previous_hash": self.head.hash}
            )
            self._write_record(
                _now(), "log_continued", {"previous_file": self._unrecorded_displacement, **previous}
            )
            self._unrecorded_displacement = None

    def _report_displaced(self, how: Displaced) -> None:
        self._metrics.audit_displaced.labels(how).inc()
        emit = self._log.info if how == "renamed" else self._log.error
        newest = None if self.head is None else self.head.seq
        emit("audit_log_displaced", how=how, path=str(self._path), newest_record=newest)

    @property
    def _next_number(self) -> int:
        return 1 if self.head is None else self.head.seq + 1

    def _note_head(self, head: Head) -> None:
        self._note.note(head, durably=self._settings.fsync == "always")
        self._synced = head

    def _fail(self, error: OSError) -> None:
        why = error.strerror or type(error).__name__
        if self.failing is None:
            self._log.error("audit_failing", error=why, path=str(self._path))
        self.failing = why
        self._metrics.audit_failing.set(1)

    def _find_end(self, noted: Head | None) -> tuple[Head | None, bytes]:
        """The last complete record, and the partial line that a crash left after it.

        Raises `ConfigError` if the end was changed: a log is not continued over a gap, nor without its head
        file, which alone shows that the end was cut off.
        """
        last, torn = None, b""
        files = log_files(self._path)
        if noted is None and (_is_not_empty(head_path(self._path)) or any(map(_is_not_empty, files))):
            raise ConfigError(_headless(self._path))
        for path in reversed(files):
            size = path.stat().st_size
            with open_regular(path) as file:
                file.seek(max(0, size - _TAIL_BYTES))
                *lines, rest = file.read().split(b"\n")
            torn = torn or rest
            if lines:
                record = read_line(lines[-1])
                if record is None:
                    raise ConfigError(_altered(self._path, "its last record was altered"))
                last = Head(record["seq"], record["hash"])
                break
        if noted is None or (last is None and noted.seq == 0):
            return last, torn
        if last is None:
            raise ConfigError(_gone(self._path, noted))
        if last.seq < noted.seq:
            raise ConfigError(_altered(self._path, f"it was truncated before record {noted.seq}"))
        if faults := faults_after(self._path, noted):
            raise ConfigError(_altered(self._path, faults[0]))
        return last, torn


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _is_not_empty(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _headless(path: Path) -> str:
    return (
        f"audit.path = {path}, but its head file {head_path(path)} is missing or "
        "unreadable, and without it a truncated log would not show; restore it, or check the log against a "
        f"head that was kept elsewhere (`mechctl audit verify {path} --head SEQ:HASH`) and move the log's "
        "files and the head file away: the gateway then starts a new log"
    )


def _altered(path: Path, what: str) -> str:
    return (
        f"audit.path = {path}, but {what}; see `mechctl audit verify {path}`, then move the log's files and "
        f"{head_path(path)} away: the gateway then starts a new log"
    )


def _gone(path: Path, noted: Head) -> str:
    return (
        f"audit.path = {path}, but the log's files are missing, and it had {noted.seq} records "
        f"({head_path(path)}); restore its files, or, if they were archived or lost, move "
        f"{head_path(path)} away too: the gateway then starts a new log"
    )
