"""The audit log's files on disk: appends records, and detects that another program moved or changed them."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from pathlib import Path
from typing import Final, Literal, get_args

from interpretops.errors import ConfigError
from interpretops.records.audit_chain import GENESIS, Head, first_number, head_line, head_path, rotated_path
from proxy.process.file_lock import hold

Displaced = Literal["renamed", "removed", "altered", "head", "lock"]
"""What another program moved or changed: the current log file, the head file, or the lock file."""
DISPLACED: Final[tuple[Displaced, ...]] = get_args(Displaced)


class LogFile:
    """The file that records are appended to."""

    def __init__(self, path: Path, first: int) -> None:
        """Open it, or make it. Raises `OSError`.

        first  number of its first record, if the file is empty
        """
        self.path = path
        # Only a regular file is accepted: a pipe could block, or swallow records.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        self.descriptor = os.open(path, flags, 0o600)
        found = os.fstat(self.descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.descriptor)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        self.size = found.st_size
        self.first = first_number(path) or first

    def displaced(self) -> Displaced | None:
        """What another program did to the file since it was opened; None if nothing."""
        ours = os.fstat(self.descriptor)
        if ours.st_nlink == 0:
            return "removed"
        if not _same(ours, self.path):
            return "renamed"
        return "altered" if ours.st_size != self.size else None

    def append(self, line: bytes) -> None:
        """Write the whole line, or leave the file unchanged. Raises `OSError`."""
        written = 0
        try:
            while written < len(line):
                written += os.write(self.descriptor, line[written:])
        except OSError:
            # Remove a partial line: the next record would be appended to it.
            with contextlib.suppress(OSError):
                os.ftruncate(self.descriptor, self.size)
            raise
        self.size += len(line)

    def next(self, first: int) -> LogFile:
        """Start a new file at the same path; this one is synced to disk and closed. Raises `OSError`.

        A file found at the path is renamed, never overwritten or appended to.
        """
        os.fsync(self.descriptor)
        aside = self._set_aside(first)
        try:
            fresh = LogFile(self.path, first)
        except OSError:
            if aside is not None:
                aside.rename(self.path)
            raise
        os.close(self.descriptor)
        sync_folder(self.path.parent)
        return fresh

    def _set_aside(self, first: int) -> Path | None:
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return None
        if there.st_size == 0:
            # Log rotation programs leave an empty file.
            return None
        ours = _same(os.fstat(self.descriptor), self.path)
        target = rotated_path(self.path, self.first)
        if not ours or target.exists():
            target = _free(self.path.with_name(f"{self.path.name}.unknown-{first:012d}"))
        self.path.rename(target)
        return target


class HeadFile:
    """Stores the head: number and hash of the newest record. Fixed length, so one write in place."""

    def __init__(self, log: Path, noted: Head | None) -> None:
        """Open it, or create it before the first record, so that a missing head file is never due to a crash.

        noted  its current content; None when there is no log yet. Raises `OSError`.
        """
        self._path = head_path(log)
        self._noted = head_line(noted or Head(0, GENESIS))
        self._descriptor = self._open()
        if noted is None:
            self._write()
            sync_folder(log.parent)

    def note(self, head: Head, *, durably: bool) -> None:
        """Store a new head. Raises `OSError`."""
        content = head_line(head)
        os.pwrite(self._descriptor, content, 0)
        os.ftruncate(self._descriptor, len(content))
        if durably:
            os.fsync(self._descriptor)
        self._noted = content

    def heal(self) -> bool:
        """Restore the file if it was moved, removed or changed. Returns whether it was."""
        moved = not _same(os.fstat(self._descriptor), self._path)
        if moved:
            old, self._descriptor = self._descriptor, self._open()
            os.close(old)
        if not moved and os.pread(self._descriptor, len(self._noted) + 1, 0) == self._noted:
            return False
        self._write()
        return True

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self) -> None:
        os.pwrite(self._descriptor, self._noted, 0)
        os.ftruncate(self._descriptor, len(self._noted))
        os.fsync(self._descriptor)

    def _open(self) -> int:
        return os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)


class Lock:
    """Ensures that only this process writes the log."""

    def __init__(self, log: Path) -> None:
        """Raises `ConfigError` when another process holds it."""
        self._path = log.with_name(log.name + ".lock")
        self._descriptor = hold(self._path, "audit.path")
        self._lost: OSError | None = None

    def require(self) -> None:
        """Raises `OSError` if the lock was lost."""
        if self._lost is not None:
            raise self._lost

    def heal(self) -> bool:
        """Take the lock again if its file was moved or removed. Returns whether it was. Raises `OSError`."""
        if _same(os.fstat(self._descriptor), self._path):
            return False
        try:
            # Do not create a missing folder: it may be a volume that is not mounted.
            self._path.parent.stat()
            fresh = hold(self._path, "audit.path")
        except (OSError, ConfigError) as error:
            wrong = error if isinstance(error, OSError) else OSError(errno.EBUSY, "another gateway writes it")
            self._lost = wrong
            raise wrong from None
        old, self._descriptor = self._descriptor, fresh
        os.close(old)
        self._lost = None
        return True

    def close(self) -> None:
        os.close(self._descriptor)


def sync_folder(path: Path) -> None:
    """Sync a folder's entries to disk."""
    folder = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _same(ours: os.stat_result, path: Path) -> bool:
    try:
        there = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)


def _free(path: Path) -> Path:
    number = 0
    chosen = path
    while chosen.exists():
        number += 1
        chosen = path.with_name(f"{path.name}-{number}")
    return chosen
