"""The gateway refuses versions of aiohttp whose server internals it does not know."""

import tomllib
from pathlib import Path

import aiohttp
import pytest
from typer.testing import CliRunner

from interpretops.errors import ConfigError
from mechctl.main import app
from proxy.http.aiohttp_version import FIRST_UNSUPPORTED, MIN_VERSION, check_aiohttp

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("version", ["3.14.3", "3.14.5", "3.14.10", aiohttp.__version__])
def test_known_versions_start(version: str) -> None:
    """The locked version and all its patch releases."""
    check_aiohttp(version)


@pytest.mark.parametrize("version", ["3.14.2", "3.15.0", "3.15.0a1", "4.0.0", "2.3"])
def test_other_versions_are_refused_in_one_line(version: str) -> None:
    """Older or newer versions: the message names the installed version and what to install."""
    with pytest.raises(ConfigError, match=r'^aiohttp = .*install "aiohttp>=3\.14\.3,<3\.15"$') as raised:
        check_aiohttp(version)
    assert version in str(raised.value)


def test_serve_checks_the_version_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mechctl serve` checks this before it opens a port."""
    monkeypatch.setattr(check_aiohttp, "__defaults__", ("3.15.0",))
    done = CliRunner().invoke(app, ["serve"])
    assert isinstance(done.exception, ConfigError)
    assert str(done.exception).startswith("aiohttp = 3.15.0")


def test_package_is_installed_with_the_same_bounds() -> None:
    """The package requires the same versions that the gateway accepts."""
    reported = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    wanted = ".".join(map(str, MIN_VERSION)), ".".join(map(str, FIRST_UNSUPPORTED))
    assert f"aiohttp>={wanted[0]},<{wanted[1]}" in reported
