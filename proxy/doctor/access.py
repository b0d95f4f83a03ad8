"""Access to the gateway: its two listeners, their certificates, and the API keys."""

from __future__ import annotations

import errno
import socket
import stat
from datetime import UTC, datetime, timedelta
from typing import Final

from interpretops.errors import InterpretOpsError
from interpretops.records.api_keys import ApiKey, read_keys
from interpretops.settings import Settings
from proxy.doctor.finding import Finding, fault, ok, warning
from proxy.http.tls import make_tls_listeners
from proxy.tenants.access import check_exposure

_SOON: Final = timedelta(days=14)


def check_listeners(settings: Settings) -> list[Finding]:
    """Check both addresses, that public ones require keys, and the certificates."""
    gateway, keys = settings.gateway, settings.paths.keys is not None
    found = _check_listener("gateway", gateway.host, gateway.port, keys=keys)
    found += _check_listener("gateway.admin", gateway.admin_host, gateway.admin_port, keys=keys)
    try:
        make_tls_listeners(gateway)
    except InterpretOpsError as error:
        found += fault("certificates", error)
    else:
        if gateway.tls_cert is None and gateway.admin_tls_cert is None:
            found.append(ok("certificates", "none: plain HTTP on both listeners"))
        else:
            found.append(ok("certificates", "certificates and keys can be read"))
    return found


def check_keys(settings: Settings) -> list[Finding]:
    """Check that the key file can be read, and how many keys are still valid."""
    path = settings.paths.keys
    if path is None:
        return [ok("keys", "no keys are required: anyone who can reach a listener may use it")]
    if not path.exists():
        return fault(
            "keys", f"paths.keys = {path}, but there is no such file; create it with `mechctl keys add`"
        )
    try:
        keys = read_keys(path)
        mode = stat.S_IMODE(path.stat().st_mode)
    except (InterpretOpsError, OSError) as error:
        return fault("keys", error)
    now = datetime.now(UTC)
    expired = [key.id for key in keys if _ends_before(key, now)]
    soon = [key.id for key in keys if key.id not in expired and _ends_before(key, now + _SOON)]
    summary = f"{len(keys)} keys in {path}"
    if not {key.id for key in keys} - set(expired):
        return fault("keys", f"{summary}, but none is valid; create one with `mechctl keys add`")
    found = [ok("keys", summary)]
    if expired or soon:
        text = f"{', '.join(expired) or 'none'} expired, {', '.join(soon) or 'none'} will within 14 days"
        found.append(warning("keys", f"{text}; `mechctl keys rotate` renews a key"))
    if mode & 0o077:
        found.append(warning("keys", f"{path} has mode {mode:o}; let only its owner read it: chmod 600"))
    return found


def _ends_before(key: ApiKey, moment: datetime) -> bool:
    return key.expires is not None and key.expires <= moment


def _check_listener(field: str, host: str, port: int, *, keys: bool) -> list[Finding]:
    address_field = f"{field}_host" if field.endswith("admin") else f"{field}.host"
    port_field = f"{field}_port" if field.endswith("admin") else f"{field}.port"
    subject = f"listener {host}:{port}"
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        check_exposure(str(address[0]), address_field, keys=keys)
        with socket.socket(family, kind, proto) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except InterpretOpsError as error:
        return fault(subject, error)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            why = "another program uses it, perhaps a running gateway; stop it, or choose another port"
        else:
            why = f"it cannot be opened ({error.strerror or error}); choose another port"
        return fault(subject, f"{port_field} = {port}, but {why}")
    return [ok(subject, "free")]
