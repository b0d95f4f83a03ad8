"""TLS for the listeners: checks certificates at start-up, and reloads them when their files change."""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal

from structlog.typing import FilteringBoundLogger

from interpretops.errors import ConfigError
from interpretops.files.regular_file import read_regular
from interpretops.settings import GatewaySettings
from proxy.http.certificate import Validity, validity
from proxy.observe.metrics import Metrics

Listener = Literal["public", "admin"]
_MAX_BYTES: Final = 2**20


class TlsListener:
    """The TLS context of one listener. Open connections keep the certificate they started with."""

    def __init__(
        self,
        listener: Listener,
        cert: Path,
        key: Path,
        field: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises `ConfigError` if certificate and key cannot be used."""
        self.listener = listener
        self.cert = cert
        self._key = key
        self._field = field
        self._clock = clock
        self._seen = self._read()
        self._newest, self.valid = self._load(self._seen)
        self.context = self._newest
        """The context for the server. Every new connection gets the newest certificate and key."""
        self.context.sni_callback = self._choose
        self.failure: str | None = None
        """Why the certificate and key on disk are not in use."""

    def refresh(self) -> bool:
        """Load the files if they changed; returns whether they did. On errors the old pair stays."""
        try:
            found = self._read()
            fresh, valid = (self._newest, self.valid) if found == self._seen else self._load(found)
        except ConfigError as error:
            self.failure = str(error)
            return False
        if valid.end <= self._clock() < self.valid.end:
            self.failure = f"{self._field} = {self.cert}, but it has expired, while the one in use has not"
            return False
        changed = found != self._seen
        self._newest, self.valid, self._seen, self.failure = fresh, valid, found, None
        return changed

    def _choose(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """Called for every connection, even if the client sends no server name."""
        connection.context = self._newest

    def _read(self) -> tuple[bytes, bytes]:
        return _content(self.cert, self._field), _content(self._key, self._field.replace("cert", "key"))

    def _load(self, read: tuple[bytes, bytes]) -> tuple[ssl.SSLContext, Validity]:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        # The gateway only supports HTTP/1.1.
        context.set_alpn_protocols(["http/1.1"])
        try:
            # The empty password makes an encrypted key fail; otherwise OpenSSL would prompt on the terminal.
            context.load_cert_chain(self.cert, self._key, password="")
            valid = validity(read[0])
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self._field} = {self.cert}, but it cannot be used with {self._key} ({error}); "
                "both must be unencrypted PEM files"
            ) from error
        if self._read() != read:
            raise ConfigError(f"{self._field} = {self.cert}, but it is being written; it will be read again")
        return context, valid


class TlsListeners:
    """The listeners that use TLS."""

    def __init__(self, tls_listeners: Sequence[TlsListener] = ()) -> None:
        self._listeners = tuple(tls_listeners)
        self._lock = threading.Lock()

    def context(self, listener: Listener) -> ssl.SSLContext | None:
        """A listener's TLS context; None if it does not use TLS."""
        return next((each.context for each in self._listeners if each.listener == listener), None)

    def refresh(self, metrics: Metrics, log: FilteringBoundLogger) -> dict[str, str]:
        """Load changed files; update metrics and log. Returns the errors by file."""
        with self._lock:
            return self._refresh(metrics, log)

    def _refresh(self, metrics: Metrics, log: FilteringBoundLogger) -> dict[str, str]:
        for each in self._listeners:
            before = each.failure
            if each.refresh():
                log.info("certificate_changed", listener=each.listener, expires=each.valid.end_iso)
            elif each.failure is not None and each.failure != before:
                log.error("certificate_refused", listener=each.listener, error=each.failure)
            metrics.tls_start.labels(each.listener).set(each.valid.start)
            metrics.tls_expiry.labels(each.listener).set(each.valid.end)
            metrics.tls_broken.labels(each.listener).set(each.failure is not None)
        return {str(each.cert): each.failure for each in self._listeners if each.failure is not None}


def make_tls_listeners(settings: GatewaySettings) -> TlsListeners:
    """Build them from the settings. Raises `ConfigError`."""
    found: list[TlsListener] = []
    pairs: tuple[tuple[Listener, Path | None, Path | None, str], ...] = (
        ("public", settings.tls_cert, settings.tls_key, "gateway.tls_cert"),
        ("admin", settings.admin_tls_cert, settings.admin_tls_key, "gateway.admin_tls_cert"),
    )
    for listener, cert, key, field in pairs:
        if cert is not None and key is not None:
            found.append(TlsListener(listener, cert, key, field))
    return TlsListeners(found)


def _content(path: Path, field: str) -> bytes:
    try:
        content = read_regular(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(f"{field} = {path}, but it cannot be read ({error.strerror})") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{field} = {path}, but it is larger than {_MAX_BYTES} bytes")
    return content
