"""A folder is there with all of its files, or as it was before."""

from pathlib import Path

import pytest

from interpretops.files.atomic_folder import recover_folder, whole_folder


def _fill(folder: Path, text: str) -> None:
    with whole_folder(folder) as draft:
        (draft / "a").write_text(text)
        assert not (folder / "a").exists() or (folder / "a").read_text() != text


def _break_off(folder: Path) -> None:
    with whole_folder(folder) as draft:
        (draft / "a").write_text("two")
        raise OSError(28, "No space left on device")


def test_new_folder_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    """Nothing is seen of it before it is whole, nothing of the old one after, and no draft stays."""
    folder = tmp_path / "models" / "m"
    _fill(folder, "one")
    (folder / "left over").write_text("x")
    _fill(folder, "two")
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert (folder / "a").read_text() == "two"
    assert [path.name for path in folder.parent.iterdir()] == ["m"]
    assert folder.stat().st_mode & 0o777 == 0o755


def test_folder_stays_as_it_was_after_an_error(tmp_path: Path) -> None:
    """A full disk in the middle leaves the old folder, and none where there was none."""
    _fill(tmp_path / "m", "one")
    for name in ("m", "n"):
        with pytest.raises(OSError, match="No space"):
            _break_off(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert (tmp_path / "m" / "a").read_text() == "one"


def test_folder_of_a_killed_process_is_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after the old folder went and before the new one came: the old one is put back, once."""
    folder = tmp_path / "m"
    _fill(folder, "one")
    real = Path.rename

    def killed_at_the_second(self: Path, target: Path) -> Path:
        if ".draft-" in self.name:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        _fill(folder, "two")
    monkeypatch.undo()
    assert not folder.exists()
    (tmp_path / ".m.draft-killed").mkdir()
    recover_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    recover_folder(folder)
    assert (folder / "a").read_text() == "one"
    _fill(folder, "three")
    recover_folder(folder)
    assert (folder / "a").read_text() == "three"
