"""Making a folder whole or not at all: whoever finds it finds all of its files."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside ``folder``, which takes its place when the block ends without an error.

    What stood there is kept until then: a process that is killed at the last moment leaves it under another
    name, from which `recover_folder` takes it back. Raises `OSError`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=_draft_prefix(folder)))
    try:
        yield draft
        draft.chmod(0o755)
        shutil.rmtree(_former(folder), ignore_errors=True)
        if folder.exists():
            folder.rename(_former(folder))
        draft.rename(folder)
        shutil.rmtree(_former(folder), ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def recover_folder(folder: Path) -> None:
    """Clear up after a process that was killed; only for one who knows that no other is at work here.

    If that was just before the new folder took the old one's place, the old one is put back.
    """
    if not folder.exists() and _former(folder).exists():
        _former(folder).rename(folder)
    for left in folder.parent.glob(f"{_draft_prefix(folder)}*"):
        shutil.rmtree(left, ignore_errors=True)


def _draft_prefix(folder: Path) -> str:
    return f".{folder.name}.draft-"


def _former(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
