"""Checks that the gateway supports the installed version of aiohttp."""

from __future__ import annotations

import re
from typing import Final

import aiohttp

from interpretops.errors import ConfigError

MIN_VERSION: Final = (3, 14, 3)
FIRST_UNSUPPORTED: Final = (3, 15)
"""The first unsupported version. `pyproject.toml` has the same two bounds."""


def check_aiohttp(version: str = aiohttp.__version__) -> None:
    """Raise `ConfigError` for a version whose internals may differ from those that `server` replaces.

    Another version might answer malformed requests in its own format, or log what a client sent.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not MIN_VERSION <= found < FIRST_UNSUPPORTED:
        supported = f">={_text(MIN_VERSION)},<{_text(FIRST_UNSUPPORTED)}"
        raise ConfigError(
            f"aiohttp = {version}, but the gateway replaces parts of aiohttp's server that may differ there; "
            f'install "aiohttp{supported}"'
        )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
