"""Authentication: a key's tenant on the OpenAI endpoint, and its role on the admin listener."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from multidict import CIMultiDictProxy
from structlog.typing import FilteringBoundLogger

from interpretops.errors import ConfigError
from interpretops.records.api_keys import ApiKey, KeyRing, Role, read_keys
from interpretops.settings import Settings, Tenant
from interpretops.settings.access import ANONYMOUS
from proxy.errors import ForeignPage, InvalidKey, KeysUnavailable, NotPermitted
from proxy.observe.metrics import Metrics
from proxy.observe.readiness import Reason
from proxy.process.file_reader import Reader, StuckError

_MAX_KEY = 512
_REFRESH_MARGIN_S: Final = 5.0
"""Slack before keys count as stale: the file is read every two seconds."""
LOOPBACK_NAMES: Final = frozenset(("localhost", "localhost.localdomain"))


@dataclass(frozen=True)
class Identity:
    """The tenant and key of a request."""

    tenant: Tenant
    key: str | None = None
    """Id of the key; None where no keys are required."""

    def check_route(self, route: str) -> None:
        """Refuse a route that this tenant may not use."""
        if self.tenant.routes is not None and route not in self.tenant.routes:
            raise NotPermitted(f"this key may not use {route}")

    def may_name(self, model: str) -> bool:
        """Whether this tenant may use this model name."""
        return self.tenant.models is None or model in self.tenant.models


class Access:
    """Holds tenants and keys, and rereads the key file when its content changes."""

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        log: FilteringBoundLogger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path: Path | None = settings.paths.keys
        self._grace_s = settings.gateway.keys_grace_s
        self._clock = clock
        self._reader = Reader(f"paths.keys = {self._path}")
        self._tenants: Mapping[str, Tenant] = {tenant.id: tenant for tenant in settings.tenants}
        self._anonymous = Identity(self._tenants.get(ANONYMOUS, Tenant(id=ANONYMOUS)))
        self._metrics = metrics
        self._log = log
        self._ring = KeyRing(())
        self._known_at = clock()
        """When the keys in force last matched the file."""
        self._deleted = False
        self.failure: str | None = None
        """Why the keys in force may differ from the file."""
        self.skipped: dict[str, str] = {}
        """Ids of keys in the file that are not accepted, and why."""
        if self._path is not None:
            if not _exists(self._path):
                raise ConfigError(
                    f"paths.keys = {self._path}, but there is no such file; "
                    "create a key with `mechctl keys add`"
                )
            self._ring = self._read(self._path)

    @property
    def keys_required(self) -> bool:
        """Whether requests need a key."""
        return self._path is not None

    @property
    def callers(self) -> list[Tenant]:
        """All tenants that can send requests."""
        return [self._anonymous.tenant] if self._path is None else [*self._tenants.values()]

    @property
    def keys(self) -> tuple[ApiKey, ...]:
        """The keys in force, including expired ones."""
        return self._ring.keys

    async def refresh_off_loop(self) -> None:
        """As `refresh`, off the event loop. A file system that hangs counts as an unreadable file."""
        try:
            await self._reader.run(self.refresh)
        except StuckError as error:
            self._note_failure(str(error))

    def refresh(self) -> None:
        """Load the keys from the file. A deleted file holds no keys: all requests are then refused.

        If the file cannot be read or is invalid, the old keys stay in force for `gateway.keys_grace_s`.
        """
        if self._path is None:
            return
        try:
            deleted = not _exists(self._path)
            ring = KeyRing(()) if deleted else self._read(self._path)
        except ConfigError as error:
            self._note_failure(str(error))
            return
        if ring.keys != self._ring.keys:
            self._log.info("keys_changed", keys=len(ring.keys))
        self._ring, self._known_at, self._deleted = ring, self._clock(), deleted
        if deleted:
            self._note_failure(
                f"paths.keys = {self._path} was deleted: all keys are revoked; restore it, or restart"
            )
        else:
            self.failure = None
            self._metrics.keys_broken.set(0)

    def summary(self) -> dict[str, Any] | None:
        """For the admin API: result of reading the key file; None where no keys are required."""
        if self._path is None:
            return None
        return {"loaded": len(self._ring.keys), "skipped": self.skipped, "failed": self.failure}

    def not_ready(self) -> Iterator[Reason]:
        """Why all requests are refused, as `identify` decides."""
        if self._path is not None and (self._deleted or self._overdue):
            detail = self.failure or f"paths.keys = {self._path} was not read for {self._grace_s:g} s"
            yield Reason("keys_unusable", detail)

    @property
    def _overdue(self) -> bool:
        return self._clock() - self._known_at > self._grace_s + _REFRESH_MARGIN_S

    def _note_failure(self, failure: str) -> None:
        if failure != self.failure:
            self._log.error("keys_refused", error=failure)
        self.failure = failure
        self._metrics.keys_broken.set(1)

    def tenant(self, name: str) -> Tenant:
        """A declared tenant. Raises `KeyError`."""
        return self._tenants[name]

    def tenant_of_key(self, key_id: str) -> Tenant:
        """The tenant of a key's id. Raises `KeyError`."""
        for key in self._ring.keys:
            if key.id == key_id and key.tenant is not None:
                return self._tenants[key.tenant]
        raise KeyError(key_id)

    def identify(self, headers: CIMultiDictProxy[str]) -> Identity:
        """The caller on the OpenAI endpoint. Refuses requests without a tenant's key."""
        if self._path is None:
            return self._anonymous
        key = self._find(headers)
        if key.tenant is None:
            raise InvalidKey("this key is not for the OpenAI endpoint")
        return Identity(self._tenants[key.tenant], key.id)

    def authorize(self, headers: CIMultiDictProxy[str], required: Role) -> str:
        """The name of an admin with the ``required`` role. Refuses everybody else."""
        if self._path is None:
            return ANONYMOUS
        key = self._find(headers)
        if key.role is None:
            raise InvalidKey("this key is not for the admin listener")
        if required == "operator" and key.role != "operator":
            raise NotPermitted("this key is read-only; use one with role operator")
        return f"{key.name or key.role} ({key.id})"

    def _find(self, headers: CIMultiDictProxy[str]) -> ApiKey:
        if self._overdue:
            raise KeysUnavailable("API keys cannot be checked at the moment; try again later")
        presented = _presented(headers)
        key = self._ring.find(presented)
        if key is None:
            raise InvalidKey(
                "the API key is not valid; send `Authorization: Bearer <key>` with a key of this gateway"
            )
        return key

    def _read(self, path: Path) -> KeyRing:
        """The file's keys, without those of undeclared tenants. These are skipped; the others still work."""
        keys = read_keys(path)
        declared = ", ".join(sorted(self._tenants)) or "none"
        skipped = {
            key.id: f"{path}: key {key.id} is for tenant {key.tenant!r}, but tenants declares {declared}; "
            "declare it or revoke the key"
            for key in keys
            if key.tenant is not None and key.tenant not in self._tenants
        }
        for key_id, why in skipped.items():
            if key_id not in self.skipped:
                self._log.error("key_skipped", key=key_id, error=why)
        self.skipped = skipped
        self._metrics.keys_skipped.set(len(skipped))
        return KeyRing(tuple(key for key in keys if key.id not in skipped))


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    return True


def check_exposure(address: str, field: str, *, keys: bool) -> None:
    """Refuse to listen beyond this machine when no keys are required. Raises `ConfigError`."""
    if not keys and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        raise ConfigError(
            f"{field} = {address!r}, but other machines can reach that address and no keys are required; "
            "set paths.keys, or listen on 127.0.0.1"
        )


def names_this_machine(host: str | None, also: Collection[str] = ()) -> bool:
    """Whether a Host header names this machine, so that no web page of another site sent it.

    ``also``: further names of this machine. A page that points its own name here (DNS rebinding) still sends
    that name.
    """
    name = (host or "").rsplit(":", 1)[0] if not (host or "").endswith("]") else (host or "")
    name = name.strip("[]").lower().removesuffix(".")
    if name in LOOPBACK_NAMES or name.endswith(".localhost") or name in {one.lower() for one in also}:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def check_page(headers: CIMultiDictProxy[str], also: Collection[str]) -> None:
    """Where no keys are required, refuse requests that a web page of another site may have sent."""
    for host in headers.getall("Host", []):  # a page always sends one
        if not names_this_machine(host, also):
            raise ForeignPage(
                f"Host = {host[:128]!r}, but without keys only names of this machine are accepted; add "
                "it to gateway.allowed_hosts, or set paths.keys"
            )
    for origin in headers.getall("Origin", []):
        scheme, _, host = origin.partition("://")
        if scheme not in ("http", "https"):
            raise ForeignPage(
                f"Origin = {origin[:128]!r}, but without keys only pages of this machine are accepted; set "
                "paths.keys and give the program a key"
            )
        if not names_this_machine(host, also):
            raise ForeignPage(
                f"Origin = {origin[:128]!r}, but without keys only pages of this machine are accepted; add "
                "its host to gateway.allowed_hosts, or set paths.keys"
            )


def _presented(headers: CIMultiDictProxy[str]) -> str:
    """The key of a request. Two headers may carry it if both carry the same key."""
    found: set[str] = set()
    for value in headers.getall("Authorization", []):
        scheme, _, key = value.partition(" ")
        if scheme.lower() != "bearer":
            raise InvalidKey("Authorization must be `Bearer <key>`")
        found.add(key.strip())
    found.update(value.strip() for value in headers.getall("x-api-key", []))
    if not found:
        raise InvalidKey("no API key was sent; send `Authorization: Bearer <key>`")
    if len(found) > 1:
        raise InvalidKey("the request carries several different API keys; send one")
    (key,) = found
    return key[:_MAX_KEY]
