"""TLS for a listener: one certificate chain, modern protocol versions, checked at the start."""

from __future__ import annotations

import ssl
from pathlib import Path

from interpretops.errors import ConfigError


def make_tls(cert: Path | None, key: Path | None, field: str) -> ssl.SSLContext | None:
    """The context of a listener; None without a certificate. Raises `ConfigError`."""
    if cert is None or key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # HTTP/1.1 is all that is spoken here.
    context.set_alpn_protocols(["http/1.1"])
    try:
        # An encrypted key would ask on the terminal; it is refused instead.
        context.load_cert_chain(cert, key, password="")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(
            f"{field} = {cert}, but it cannot be used with {key} ({why}); both are PEM files, unencrypted"
        ) from error
    return context
