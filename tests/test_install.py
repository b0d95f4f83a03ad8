"""The installer: one clear line when it cannot work, nothing to do when it has worked before."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing but what the installer reads."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "locks", folder / "locks", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def install(checkout: Path, *, path: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the installer with the system's own tools, those in ``path`` before them."""
    environ["PATH"] = f"{path}:/usr/bin:/bin" if path else "/usr/bin:/bin"
    command = [checkout / "locks" / "install.sh"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)


def key_of(checkout: Path) -> str:
    """What the stamp of a finished installation would say."""
    command = [sys.executable, str(checkout / "locks" / "lock.py"), "key"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_other_python_is_refused_in_one_line(checkout: Path) -> None:
    """An interpreter of another version than the lock's stops before anything is made."""
    other = script(checkout.parent / "python", "echo 3.13")
    result = install(checkout, PYTHON=str(other))
    assert result.returncode == 1
    assert result.stderr == (
        f"install: PYTHON={other} is no Python 3.11, which locks/cpu.txt is for; "
        "name another, or leave it out\n"
    )
    assert not (checkout / ".venv").exists()


def test_missing_venv_module_names_debians_package(checkout: Path) -> None:
    """Debian's Python without python3-venv is told apart and the remedy named."""
    bare = script(
        checkout.parent / "python",
        f'case "$*" in *"import venv"*) exit 1;; esac\nexec {sys.executable} "$@"',
    )
    result = install(checkout, PYTHON=str(bare))
    assert result.returncode == 1
    assert "cannot make virtual environments; on Debian: apt-get install python3-venv" in result.stderr
    assert not (checkout / ".venv").exists()


def test_too_little_disk_is_told_before_anything_is_fetched(checkout: Path) -> None:
    """What is free and what is needed stand in the one line."""
    script(checkout.parent / "bin" / "df", "echo head\necho /dev/x 9 9 2097152 9% /")
    result = install(checkout, path=checkout.parent / "bin", PYTHON=sys.executable)
    assert result.returncode == 1
    assert f"2 GiB are free in {checkout}, but the environment needs about 6" in result.stderr


def test_second_run_installs_nothing(checkout: Path) -> None:
    """With the stamp of this very lock in place the installer says and does nothing."""
    script(checkout / ".venv" / "bin" / "python", "exit 1")
    (checkout / ".venv" / "installed").write_text(key_of(checkout) + "\n")
    result = install(checkout, PYTHON=sys.executable)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_changed_lock_or_requirements_ask_for_an_installation(checkout: Path) -> None:
    """The stamp's key follows the lock and the package's own metadata, and not the tools' settings."""
    before = key_of(checkout)
    pyproject = checkout / "pyproject.toml"
    pyproject.write_text(pyproject.read_text().replace("line-length = 110", "line-length = 111"))
    assert key_of(checkout) == before
    pyproject.write_text(pyproject.read_text().replace('version = "0.1.0"', 'version = "0.1.1"'))
    changed = key_of(checkout)
    lock = checkout / "locks" / "cpu.txt"
    lock.write_text(lock.read_text() + "\n")
    assert len({before, changed, key_of(checkout)}) == 3


def test_failed_installation_leaves_no_stamp(checkout: Path) -> None:
    """When pip fails the stamp of an earlier lock is gone, and the output shown names the log."""
    script(
        checkout / ".venv" / "bin" / "python",
        'case "$*" in *--version*) exit 0;; esac\necho no wheel\nexit 1',
    )
    (checkout / ".venv" / "installed").write_text("older\n")
    result = install(checkout, PYTHON=sys.executable)
    assert result.returncode == 1
    assert "no wheel" in result.stderr
    assert ".venv/install.log" in result.stderr
    assert not (checkout / ".venv" / "installed").exists()
