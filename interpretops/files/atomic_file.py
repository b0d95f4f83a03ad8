"""Atomic writes: no reader sees a partial file or loses access to it."""

import contextlib
import os
import pwd
import secrets
import stat
from pathlib import Path
from typing import Final

PRIVATE: Final = 0o600
SHARED: Final = 0o666
_ACL: Final = "system.posix_acl_access"


def write_atomically(path: Path, data: bytes, mode: int = SHARED) -> None:
    """Write ``data`` to a temporary file in the same folder, flush it to disk, and rename it to ``path``.

    A replaced file passes on its owner, group, mode and access list. A new file gets ``mode``, less the
    process's umask. Raises `OSError`, and leaves the old file unchanged: `PermissionError` if the owner
    cannot be preserved and could not read the new file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, mode), "wb") as file:
            _hand_on(path, file.fileno())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _hand_on(path: Path, file: int) -> None:
    """Copy owner, group, mode and access list from the file at ``path``."""
    try:
        before = path.stat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(before.st_mode):
        for user, group in ((before.st_uid, -1), (-1, before.st_gid)):
            # Only root may change the owner; a member of the group may keep the group.
            with contextlib.suppress(OSError):
                os.fchown(file, user, group)
        after = os.fstat(file)
        kept = stat.S_IMODE(before.st_mode)
        # A different group must not get the old group's permissions.
        os.fchmod(file, kept if after.st_gid == before.st_gid else kept & ~0o070)
        with contextlib.suppress(OSError, AttributeError):  # no access list, or a system without them
            os.setxattr(file, _ACL, os.getxattr(path, _ACL))
        if can_read(before.st_uid, before) and not can_read(before.st_uid, os.fstat(file)):
            raise PermissionError(
                f"{path} belongs to {_user_name(before.st_uid)}, who could not read what "
                f"{_user_name(os.geteuid())} would write; do it as that user, or as root"
            )


def can_read(user: int, file: os.stat_result) -> bool:
    """Whether a user may read a file, by owner, group and mode."""
    if user in (0, file.st_uid):
        return user == 0 or bool(file.st_mode & stat.S_IRUSR)
    if file.st_gid in _groups(user):
        return bool(file.st_mode & stat.S_IRGRP)
    return bool(file.st_mode & stat.S_IROTH)


def _groups(user: int) -> list[int]:
    try:
        entry = pwd.getpwuid(user)
    except KeyError:
        return []
    return os.getgrouplist(entry.pw_name, entry.pw_gid)


def _user_name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
