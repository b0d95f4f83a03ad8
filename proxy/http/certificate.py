"""Reads the validity period of certificates, the only X.509 field needed here."""

from __future__ import annotations

import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

_PEM = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSION: Final = 0xA0
_UTC_TIME: Final = 0x17
_LONG: Final = 0x80
_VALIDITY_FIELD: Final = 3
"""Index of the field, after serial number, algorithm and issuer."""


@dataclass(frozen=True)
class Validity:
    """A validity period, in Unix seconds."""

    start: float
    end: float

    @property
    def end_iso(self) -> str:
        """The end in ISO 8601."""
        return datetime.fromtimestamp(self.end, UTC).isoformat()


def validity(pem: bytes) -> Validity:
    """The period in which all certificates of a PEM chain are valid. Raises `ValueError`."""
    found = [_of_der(ssl.PEM_cert_to_DER_cert(block.decode("ascii"))) for block in _PEM.findall(pem)]
    if not found:
        raise ValueError("the file holds no certificate")
    return Validity(max(each.start for each in found), min(each.end for each in found))


def _of_der(der: bytes) -> Validity:
    try:
        (_, certificate), *_ = _parts(der)
        (_, signed), *_ = _parts(certificate)
        fields = [(tag, content) for tag, content in _parts(signed) if tag != _VERSION]
        (start_tag, start), (end_tag, end) = _parts(fields[_VALIDITY_FIELD][1])
        return Validity(_time(start_tag, start), _time(end_tag, end))
    except (IndexError, ValueError) as error:
        raise ValueError("its validity period cannot be read") from error


def _parts(der: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and content of each element in a DER sequence."""
    at = 0
    while at < len(der):
        tag, length, at = der[at], der[at + 1], at + 2
        if length & _LONG:
            size = length & ~_LONG
            length, at = int.from_bytes(der[at : at + size]), at + size
        if at + length > len(der):
            raise ValueError("truncated")
        yield tag, der[at : at + length]
        at += length


def _time(tag: int, content: bytes) -> float:
    form = "%y%m%d%H%M%SZ" if tag == _UTC_TIME else "%Y%m%d%H%M%SZ"
    return datetime.strptime(content.decode("ascii"), form).replace(tzinfo=UTC).timestamp()
