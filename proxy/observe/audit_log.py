"""Writes the audit log: who got which revision, who changed what; never what was said."""

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
_MOST_WAITING: Final = 10_000
_TAIL_BYTES: Final = 64 * 1024


class AuditLog:
    """An append-only log that no line can be taken from unseen. One process writes it."""

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
        """Records that could not be written yet, in order."""
        self._omitted = 0
        self._syncing = asyncio.Lock()
        self._sync_task: asyncio.Task[None] | None = None
        self._synced: Head | None = None
        self._untold: Displaced | None = None
        """What happened to the file before the one that is written now, until it is recorded."""
        self.failing: str | None = None
        """Why the log cannot be written at the moment."""
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
        self._waiting.append((_now(), event, fields))
        self._write_waiting()
        if self._settings.fsync == "always" and (self._sync_task is None or self._sync_task.done()):
            # What is written while it runs is forced out by the look of the next second at the latest.
            self._sync_task = self._supervisor.spawn("audit sync", self.sync())

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

    async def keep(self, alive: Callable[[], None]) -> None:
        """Force lines to the disk as the settings say, and try again what failed, until cancelled."""
        while True:
            await asyncio.sleep(_SYNC_EVERY_S)
            self.look()
            if self._waiting:
                self._write_waiting()
            elif self.failing is not None:
                # What was refused left nothing behind, and only writing tells that it can be done again.
                self.append("audit_recovered", why=self.failing)
            await self.sync()
            alive()

    def look(self) -> None:
        """Go on in a new file, on the same chain, if another program moved or changed the one being written.

        For programs that rotate logs: they rename the file; this notices within a second, and at once when
        the gateway is told to reload.
        """
        try:
            if self._lock.heal():
                self._tell_displaced("lock")
            if self._note.heal():
                self._tell_displaced("head")
            self._go_on_if_displaced()
        except OSError as error:
            self._fail(error)

    async def sync(self) -> None:
        """Force what was written to the disk, then note the head."""
        async with self._syncing:
            head = self.head
            if head is None or head == self._synced:
                return
            try:
                if self._settings.fsync != "never":
                    # A file that was set aside meanwhile was forced out then.
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
        """Force everything out; what still cannot be written is lost, and the log says so."""
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
        self._go_on_if_displaced()
        self._write_record(time, event, fields)

    def _write_record(self, time: str, event: str, fields: dict[str, Any]) -> None:
        seq, prev = self._next_number, GENESIS if self.head is None else self.head.hash
        line, digest = make_line(seq, prev, time, event, fields)
        if self._file.size and self._file.size + len(line) > self._settings.rotate_bytes:
            self._file = self._file.next(seq)
        self._file.append(line)
        self.head = Head(seq, digest)
        self._metrics.audit_records.inc()

    def _go_on_if_displaced(self) -> None:
        self._lock.require()
        how = self._file.displaced()
        if how is not None:
            self._file = self._file.next(self._next_number)
            self._untold = how
            self._tell_displaced(how)
        if self._untold is not None:
            told = (
                {} if self.head is None else {"previous_seq": self.head.seq, "previous_hash": self.head.hash}
            )
            self._write_record(_now(), "log_continued", {"previous_file": self._untold, **told})
            self._untold = None

    def _tell_displaced(self, how: Displaced) -> None:
        self._metrics.audit_displaced.labels(how).inc()
        tell = self._log.info if how == "renamed" else self._log.error
        newest = None if self.head is None else self.head.seq
        tell("audit_log_displaced", how=how, path=str(self._path), newest_record=newest)

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
        """The last whole record, and what a crash left of one after it.

        Raises `ConfigError` when the end is not what was written: a log is not continued over a gap, nor
        without the note of its newest record, which alone shows that its end was cut off.
        """
        last, torn = None, b""
        files = log_files(self._path)
        if noted is None and (_holds_something(head_path(self._path)) or any(map(_holds_something, files))):
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
                    raise ConfigError(_altered(self._path, "its last record was changed"))
                last = Head(record["seq"], record["hash"])
                break
        if noted is None or (last is None and noted.seq == 0):
            return last, torn
        if last is None:
            raise ConfigError(_gone(self._path, noted))
        if last.seq < noted.seq:
            raise ConfigError(_altered(self._path, f"it was cut off before record {noted.seq}"))
        if faults := faults_after(self._path, noted):
            raise ConfigError(_altered(self._path, faults[0]))
        return last, torn


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _holds_something(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except FileNotFoundError:
        return False


def _headless(path: Path) -> str:
    return (
        f"audit.path = {path}, but {head_path(path)}, the note of its newest record, is missing or "
        "unreadable, and without it a cut-off end would not show; put it back, or check the log against a "
        f"head that was kept elsewhere (`mechctl audit verify {path} --head SEQ:HASH`) and move the log's "
        "files and the note aside: a new log is begun"
    )


def _altered(path: Path, what: str) -> str:
    return (
        f"audit.path = {path}, but {what}; see `mechctl audit verify {path}`, then move the log's files and "
        f"{head_path(path)} aside: a new log is begun"
    )


def _gone(path: Path, noted: Head) -> str:
    return (
        f"audit.path = {path}, but no file of that log is there, and it had {noted.seq} records "
        f"({head_path(path)}); put its files back, or, where they are kept elsewhere or lost, move "
        f"{head_path(path)} there too: a new log is begun"
    )
