"""Opens files from untrusted folders: only regular files, never a pipe or device that blocks the reader."""

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file, or a link to one, for reading bytes. Raises `OSError` at once for anything else.

    Opening a pipe would wait for its writer, and a terminal or device may never end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _require_plain(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_plain(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def read_regular(path: Path, most_bytes: int) -> bytes:
    """Read a regular file, up to ``most_bytes`` + 1 bytes; a longer result means that the file is too large.

    Raises `OSError` as `open_regular`.
    """
    with open_regular(path) as file:
        return file.read(most_bytes + 1)
