"""A checkpoint folder, written whole or not at all, with its run's identity and every file's sha256."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from discovery.errors import DiscoveryError
from discovery.jobs.checksummed_file import REMEDY
from discovery.jobs.run_folder import difference
from discovery.jobs.whole_file import unwritten, write_json
from interpretops.artifacts.dictionary.manifest import sha256_of
from interpretops.files.atomic_folder import whole_folder
from interpretops.files.json_file import read_json_object

IDENTITY = "settings.json"
SUMS = "sha256.json"


@contextmanager
def checksummed_folder(folder: Path, identity: dict[str, Any]) -> Iterator[Path]:
    """A new folder to write into. When the block ends, it gets its checksums and replaces ``folder``.

    If the disk is full, the previous checkpoint remains, and `DiscoveryError` is raised.
    """
    try:
        with whole_folder(folder) as draft:
            yield draft
            write_json(draft / SUMS, {path.name: sha256_of(path) for path in sorted(draft.iterdir())})
            write_json(draft / IDENTITY, identity)
    except OSError as error:
        raise unwritten(folder, error) from error


def verify_checksummed_folder(folder: Path, identity: dict[str, Any]) -> None:
    """Raise `DiscoveryError` for a damaged checkpoint or one of another run."""
    try:
        there, sums = (read_json_object(folder / name, DiscoveryError) for name in (IDENTITY, SUMS))
    except DiscoveryError as error:
        raise DiscoveryError(f"{folder}: is not a finished step ({error}); {REMEDY}") from error
    changed = difference(there, identity)
    if changed is not None:
        raise DiscoveryError(
            f"{folder}: belongs to another run ({changed}); {REMEDY}, or give another --work"
        )
    for name, total in sums.items():
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            found = str(error.strerror)
        if found != total:
            raise DiscoveryError(
                f"{folder}: is not a finished step (the checksum of {name} does not match); {REMEDY}"
            )
