"""Whether the aiohttp that is installed is one whose server the gateway knows how to extend."""

from __future__ import annotations

import re
from typing import Final

import aiohttp

from interpretops.errors import ConfigError

LEAST: Final = (3, 14, 3)
BELOW: Final = (3, 15)
"""`pyproject.toml` bounds aiohttp by the same two."""


def check_aiohttp(version: str = aiohttp.__version__) -> None:
    """Raise `ConfigError` for an aiohttp whose internals may not be those that `server` replaces.

    Another one might answer broken requests in its own words, or log what a client sent.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if not LEAST <= found < BELOW:
        wanted = f">={_text(LEAST)},<{_text(BELOW)}"
        raise ConfigError(
            f"aiohttp = {version}, but the gateway replaces parts of aiohttp's server that may differ there; "
            f'install "aiohttp{wanted}"'
        )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
