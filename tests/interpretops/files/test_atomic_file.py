"""A file that is replaced stays readable for whoever could read it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from interpretops.errors import ConfigError
from interpretops.files.atomic_file import PRIVATE, can_read, write_atomically
from interpretops.records.api_keys import make_key, read_keys, write_keys

GATEWAY, OPERATOR, TEAM = 54321, 54322, 54323
"""Users and a group that no machine has."""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


@contextmanager
def acting_as(user: int, *groups: int) -> Iterator[None]:
    """Be another user while the block runs."""
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(user)
    os.seteuid(user)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in which everybody may write, reached by everybody: those of pytest are its user's alone."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


def of(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_uid, found.st_gid, found.st_mode & 0o7777


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o440])
def test_mode_is_handed_on(tmp_path: Path, mode: int) -> None:
    """Whatever mode a file has, the one that replaces it has it too."""
    path = tmp_path / "file"
    path.write_bytes(b"before")
    path.chmod(mode)
    write_atomically(path, b"after", PRIVATE)
    assert (path.read_bytes(), of(path)[2]) == (b"after", mode)
    assert list(tmp_path.iterdir()) == [path]


def test_new_file_obeys_the_umask(tmp_path: Path) -> None:
    """A card or a policy that one user publishes is not for that user alone; a secret is."""
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "card", b"")
        write_atomically(tmp_path / "secret", b"", PRIVATE)
    finally:
        os.umask(before)
    assert (of(tmp_path / "card")[2], of(tmp_path / "secret")[2]) == (0o640, 0o600)


@needs_root
def test_root_leaves_the_gateway_its_file(folder: Path) -> None:
    """`mechctl keys revoke` as root: the file stays the gateway user's, and is not opened wider."""
    path = folder / "keys.yaml"
    kept = [make_key(tenant="a")[1], make_key(tenant="a")[1]]
    write_keys(path, kept)
    os.chown(path, GATEWAY, TEAM)
    path.chmod(0o640)
    write_keys(path, kept[:1])
    assert of(path) == (GATEWAY, TEAM, 0o640)
    with acting_as(GATEWAY):
        assert read_keys(path) == tuple(kept[:1])


@needs_root
def test_file_that_its_owner_could_not_read_any_more_is_not_replaced(folder: Path) -> None:
    """By another user who may write in the folder: refused with the remedy, and the file is as it was."""
    path = folder / "keys.yaml"
    kept = [make_key(tenant="a")[1], make_key(tenant="a")[1]]
    with acting_as(GATEWAY):
        write_keys(path, kept)
    path.chmod(0o640)
    os.chown(path, GATEWAY, TEAM)
    with (
        acting_as(OPERATOR),
        pytest.raises(ConfigError, match=r"user 54321, who could not read .* is unchanged"),
    ):
        write_keys(path, kept[:1])
    assert of(path) == (GATEWAY, TEAM, 0o640)
    assert read_keys(path) == tuple(kept)
    assert list(folder.iterdir()) == [path]


@needs_root
def test_group_is_kept_by_its_members(folder: Path) -> None:
    """What everybody may read is replaced by another user, and the group stays where that user is in it."""
    path = folder / "policy.yaml"
    path.write_bytes(b"before")
    path.chmod(0o664)
    os.chown(path, GATEWAY, TEAM)
    with acting_as(OPERATOR, TEAM):
        write_atomically(path, b"after")
    assert of(path) == (OPERATOR, TEAM, 0o664)
    assert can_read(GATEWAY, path.stat())
