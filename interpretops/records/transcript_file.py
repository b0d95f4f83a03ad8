"""Transcripts on disk: a folder per tenant, a file per day, an encrypted line per request."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from interpretops.errors import ConfigError
from interpretops.files.regular_file import read_regular

_MOST_KEY_BYTES: Final = 64 * 1024
_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}")


class Vault:
    """Encrypts and decrypts one tenant's records with its keys (Fernet: AES-128-CBC and HMAC-SHA256)."""

    def __init__(self, tenant: str, reference: str) -> None:
        """``reference``: `env:NAME` or `file:PATH`. It holds keys, newest first; the first one encrypts.

        Raises `ConfigError`, which never contains a key.
        """
        fernet = _fernet(f"tenant {tenant!r}: transcripts need")
        keys = _resolve(tenant, reference).split()
        try:
            self._box = fernet.MultiFernet([fernet.Fernet(key) for key in keys])
        except ValueError:
            raise ConfigError(
                f"tenant {tenant!r}: transcripts.key = {reference!r}, but that must hold one key per line; "
                "create one with `mechctl transcripts key`"
            ) from None
        self._tenant = tenant
        self._invalid = fernet.InvalidToken

    def seal(self, request_id: str, record: Mapping[str, Any]) -> bytes:
        """One line."""
        text = json.dumps({**record, "tenant": self._tenant}, ensure_ascii=False, separators=(",", ":"))
        box = self._box.encrypt(text.encode("utf-8", "surrogateescape"))
        return json.dumps({"id": request_id, "box": box.decode()}).encode() + b"\n"

    def open(self, line: bytes) -> dict[str, Any] | None:
        """The record in a line; None if it is damaged, of another tenant, or encrypted with another key."""
        try:
            record: dict[str, Any] = json.loads(self._box.decrypt(json.loads(line)["box"]))
        except (ValueError, KeyError, TypeError, self._invalid):
            return None
        return record if record.get("tenant") == self._tenant else None


def make_key() -> str:
    """Generate a key. Raises `ConfigError`."""
    return str(_fernet("making a key needs").Fernet.generate_key().decode())


def append(folder: Path, tenant: str, day: date, line: bytes) -> None:
    """Append a line to the tenant's file of the day. A partial line left by a full disk stays separate."""
    path = folder / tenant / f"{day.isoformat()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:
            line = line[os.write(file, line) :]
    finally:
        os.close(file)


def read(folder: Path, tenant: str, day: date | None = None) -> Iterator[tuple[str, bytes]]:
    """Location and content of every line, oldest first."""
    for path in _files(folder / tenant):
        if day is None or path.stem == day.isoformat():
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        yield f"{path}:{number}", line


def delete_old(folder: Path, retention_days: int, today: date) -> int:
    """Delete all tenants' files that are ``retention_days`` old or older; return how many."""
    deleted = 0
    for path in [path for tenant in _folders(folder) for path in _files(tenant)]:
        if (today - date.fromisoformat(path.stem)).days >= retention_days:
            path.unlink(missing_ok=True)
            deleted += 1
    return deleted


def _fernet(needs: str) -> ModuleType:
    try:
        from cryptography import fernet
    except ImportError as error:
        raise ConfigError(f"{needs} {error.name}; pip install 'interpretops[transcripts]'") from error
    return fernet


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _files(tenant: Path) -> list[Path]:
    return sorted(path for path in tenant.glob("*.jsonl") if _DAY.fullmatch(path.stem))


def _resolve(tenant: str, reference: str) -> str:
    kind, _, name = reference.partition(":")
    where = f"tenant {tenant!r}: transcripts.key = {reference!r}"
    if kind == "env":
        if not os.environ.get(name):
            raise ConfigError(f"{where}, but that variable is not set; set it")
        return os.environ[name]
    try:
        return read_regular(Path(name).expanduser(), _MOST_KEY_BYTES).decode("ascii")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}, but that cannot be read ({type(error).__name__})") from None
