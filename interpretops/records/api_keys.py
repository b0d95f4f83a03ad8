"""API keys: made at random, shown once, kept as salted hashes in a file, compared in constant time."""

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
    """What is kept of a key: enough to know it again, too little to make it."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{12}$")]
    """The part of the key by which it is looked up; no secret."""
    tenant: Label | None = None
    """Whose requests it opens the OpenAI endpoint for."""
    role: Role | None = None
    """What it may do on the admin listener: look, or also change."""
    name: str = ""
    """Who holds it, for people."""
    salt: Hex
    """Random, so that equal keys look different."""
    sha256: Hex
    """sha256 of salt and key. The key's secret part has 256 random bits: no slower hash adds anything."""
    created: datetime
    """When it was made."""
    expires: datetime | None = None
    """When it stops working."""

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
"""Compared with when no key is known; nothing hashes to it."""


def make_key(
    *,
    tenant: str | None = None,
    role: Role | None = None,
    name: str = "",
    expires: datetime | None = None,
    key_id: str | None = None,
) -> tuple[str, ApiKey]:
    """A new key as its holder gets it, and what is kept of it; under the id of an old one if given."""
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
    """The same key with another secret: bindings, limits and log lines that name its id stay true."""
    return make_key(tenant=key.tenant, role=key.role, name=key.name, expires=expires, key_id=key.id)


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys of a file. Raises `ConfigError`, one line per fault, without hashes."""
    content = read_yaml(path, ConfigError).data
    try:
        listed = _KeyList.model_validate({} if content is None else content)
    except ValidationError as error:
        faults = (f"{path}: {show_path(fault['loc'])}: {fault['msg']}" for fault in error.errors())
        raise ConfigError("\n".join(faults)) from None
    ids = [key.id for key in listed.keys]
    if len(set(ids)) != len(ids):
        raise ConfigError(f"{path}: key {max(ids, key=ids.count)} stands there twice; keep one")
    return listed.keys


def write_keys(path: Path, keys: Sequence[ApiKey]) -> None:
    """Write the file whole or not at all; a new one is readable for its owner alone. Raises `ConfigError`."""
    lines = ["# Written by `mechctl keys`. Holds hashes, no keys.", "keys:" if keys else "keys: []"]
    # As JSON, which quotes: an id of digits and an e would be read as a number.
    lines += [f"- {json.dumps(key.model_dump(mode='json', exclude_none=True))}" for key in keys]
    try:
        write_atomically(path, "\n".join([*lines, ""]).encode(), PRIVATE)
    except OSError as error:
        # Our own error, of a file that its owner could not read any more, has no number.
        told = f"{path} cannot be written ({error.strerror})" if error.errno else str(error)
        raise ConfigError(f"{told}; the file is as it was") from error


@dataclass(frozen=True)
class KeyRing:
    """Keys to compare with."""

    keys: tuple[ApiKey, ...]

    def find(self, presented: str, now: datetime | None = None) -> ApiKey | None:
        """The key that ``presented`` is; None when it is none, or has expired.

        An unknown id takes the same steps as a wrong secret, and the comparison always looks at every byte.
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
