"""API keys: generated at random, shown once, stored as salted hashes in a file, compared in constant time."""

import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, ValidationError, model_validator

from interpretops.errors import ConfigError
from interpretops.files.atomic_file import PRIVATE, write_atomically
from interpretops.files.strict_yaml import read_yaml, show_path
from interpretops.settings.section import Label, Section

Role = Literal["viewer", "operator"]
_KEY = re.compile(r"iops_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ApiKey(Section):
    """The stored record of a key: enough to recognise the key, too little to reconstruct it."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    """The part of the key by which it is looked up; not secret."""
    tenant: Label | None = None
    """The tenant whose requests the key authorises at the OpenAI endpoint."""
    role: Role | None = None
    """What the key may do on the admin listener: read, or also change."""
    name: str = ""
    """Who holds the key; a note for people."""
    salt: Hex
    """Random, so that equal keys have different hashes."""
    sha256: Hex
    """sha256 of salt and key. The secret part has 256 random bits, so a slower hash would add nothing."""
    created: datetime
    """When the key was created."""
    expires: datetime | None = None
    """When the key stops working."""

    @model_validator(mode="after")
    def _one_use(self) -> Self:
        if (self.tenant is None) == (self.role is None):
            raise ValueError(f"key {self.id} needs either a tenant or a role")
        for field in ("created", "expires"):
            moment = getattr(self, field)
            if moment is not None and moment.tzinfo is None:
                raise ValueError(f"{field} = {moment}, but has no time zone; write it with Z")
        return self


class _KeyList(Section):
    keys: tuple[ApiKey, ...] = ()


_NOBODY = ApiKey(
    id="0" * 12, tenant="nobody", salt="0" * 64, sha256="0" * 64, created=datetime(1970, 1, 1, tzinfo=UTC)
)
"""Compared with when the id is unknown; nothing hashes to it."""


def make_key(
    *,
    tenant: str | None = None,
    role: Role | None = None,
    name: str = "",
    expires: datetime | None = None,
    key_id: str | None = None,
) -> tuple[str, ApiKey]:
    """A new key as its holder gets it, and its stored record; with the id of an old key if given."""
    key_id = secrets.token_hex(6) if key_id is None else key_id
    key, salt = f"iops_{key_id}_{secrets.token_urlsafe(32)}", secrets.token_hex(32)
    kept = ApiKey(
        id=key_id,
        tenant=tenant,
        role=role,
        name=name,
        salt=salt,
        sha256=_hash(salt, key),
        created=datetime.now(UTC).replace(microsecond=0),
        expires=expires,
    )
    return key, kept


def rotate_key(key: ApiKey, expires: datetime | None) -> tuple[str, ApiKey]:
    """The same key with a new secret: bindings, limits and log lines that name its id stay valid."""
    return make_key(tenant=key.tenant, role=key.role, name=key.name, expires=expires, key_id=key.id)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """Read the keys in a file. Raises `ConfigError` with one line per fault and no hashes."""
    content = read_yaml(path, ConfigError).data
    try:
        listed = _KeyList.model_validate({} if content is None else content)
    except ValidationError as error:
        faults = (f"{path}: {show_path(fault['loc'])}: {fault['msg']}" for fault in error.errors())
        raise ConfigError("\n".join(faults)) from None
    ids = [key.id for key in listed.keys]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{path}: key {max(ids, key=ids.count)} appears twice; keep one")
    return listed.keys


def write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """Write the file atomically; only its owner can read a new file. Raises `ConfigError`."""
    lines = ["# Written by `mechctl keys`. Holds hashes, no keys.", "keys:" if keys else "keys: []"]
    # As JSON, which quotes strings: YAML would read an id of digits and an e as a number.
    lines += [f"- {json.dumps(key.model_dump(mode='json', exclude_none=True))}" for key in keys]
    try:
        write_atomically(path, "\n".join([*lines, ""]).encode(), PRIVATE)
    except OSError as error:
        # Our own error, for a file that its owner could no longer read, has no errno.
        reason = f"{path} cannot be written ({error.strerror})" if error.errno else str(error)
        raise ConfigError(f"{reason}; the file is unchanged") from error


@dataclass(frozen=True)
class KeyRing:
    """The known keys, to compare a presented key with."""

    keys: tuple[ApiKey, ...]

    def find(self, presented: str, now: datetime | None = None) -> ApiKey | None:
        """The key that matches ``presented``, or None if none does or it has expired.

        An unknown id takes the same steps as a wrong secret, and the comparison always reads every byte.
        """
        shape = _KEY.fullmatch(presented)
        known = next((key for key in self.keys if shape is not None and key.id == shape[1]), None)
        kept = known or _NOBODY
        same = hmac.compare_digest(_hash(kept.salt, presented), kept.sha256)
        if known is None or not same:
            return None
        if known.expires is not None and known.expires <= (now or datetime.now(UTC)):
            return None
        return known


def _hash(salt: str, key: str) -> str:
    return hashlib.sha256(bytes.fromhex(salt) + key.encode("utf-8", "surrogateescape")).hexdigest()
