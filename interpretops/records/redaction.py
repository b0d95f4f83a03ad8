"""Redacts personal data and secrets, by pattern and check digit. It does not find people's names."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Any, Final

from interpretops.errors import ConfigError

_SECRET: Final = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
    r"|\b(?:sk|pk|rk)[-_][A-Za-z0-9_-]{20,}|\bAKIA[0-9A-Z]{16}\b|\bgh[pousr]_[A-Za-z0-9]{36,}"
    r"|\bxox[abprs]-[A-Za-z0-9-]{10,}|\biops_[0-9a-f]{12}_[A-Za-z0-9_-]{43}"
    r"|\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}",
    re.DOTALL,
)
_EMAIL: Final = re.compile(r"[^\s<>@,;:\"'()\[\]{}]{1,64}@(?:[\w-]{1,63}\.){1,8}\w{2,24}")
_ADDRESS: Final = re.compile(r"(?<![\w.:])[0-9A-Fa-f:.]{3,45}(?![\w:])")
_SHORTEST_ADDRESS: Final = len("1.1.1.1")
_IBAN: Final = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_CARD: Final = re.compile(r"(?<!\d)\d(?:[ -]?\d){11,18}(?!\d)")
_SHORTEST_NUMBER: Final = 10**6
_SSN: Final = re.compile(r"\b\d{3}-\d{2}-\d{4}\b")


class Redactor:
    """Replaces personal data by its kind. Finds it by pattern, by check digit and with libphonenumber."""

    def __init__(self, regions: Sequence[str]) -> None:
        """``regions``: countries whose phone numbers need no country code. Raises `ConfigError`."""
        try:
            import phonenumbers
            from stdnum import iban, luhn
            from stdnum.us import ssn
        except ImportError as error:
            raise ConfigError(
                f"compliance.pii_redaction needs {error.name}; pip install 'interpretops[transcripts]'"
            ) from error
        for region in regions:
            if region not in phonenumbers.SUPPORTED_REGIONS:
                raise ConfigError(
                    f"compliance.phone_regions: {region!r} is not a libphonenumber country; write US, DE, …"
                )
        self._phones, self._iban, self._luhn, self._ssn = phonenumbers, iban, luhn, ssn
        self._regions = regions

    def text(self, text: str) -> str:
        """The redacted text."""
        text = _SECRET.sub("[SECRET]", text)
        text = _EMAIL.sub("[EMAIL]", text)
        text = _IBAN.sub(self._bank_account, text)
        text = _CARD.sub(lambda found: self._checked(found, self._luhn, "[CARD]"), text)
        text = _SSN.sub(lambda found: self._checked(found, self._ssn, "[SSN]"), text)
        text = _ADDRESS.sub(_network_address, text)
        for region in self._regions:
            text = self._without_phones(text, region)
        return text

    def value(self, value: Any) -> Any:
        """Redact every string and integer in a JSON value, including object keys."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, int) and abs(value) >= _SHORTEST_NUMBER:
            return value if (text := self.text(str(value))) == str(value) else text
        if isinstance(value, dict):
            return {self.text(name): self.value(child) for name, child in value.items()}
        return [self.value(child) for child in value] if isinstance(value, list) else value

    def _bank_account(self, found: re.Match[str]) -> str:
        """Redact an IBAN; keep whatever else the greedy match included."""
        parts = found[0].split(" ")
        for end in range(len(parts), 0, -1):
            if self._iban.is_valid("".join(parts[:end])):
                return " ".join(["[IBAN]", *parts[end:]])
        return found[0]

    def _checked(self, found: re.Match[str], kind: Any, name: str) -> str:
        return name if kind.is_valid(found[0].replace(" ", "").replace("-", "")) else found[0]

    def _without_phones(self, text: str, region: str) -> str:
        parts, end = [], 0
        for match in self._phones.PhoneNumberMatcher(text, region):
            parts += [text[end : match.start], "[PHONE]"]
            end = match.end
        return "".join([*parts, text[end:]])


def _network_address(found: re.Match[str]) -> str:
    candidate = found[0].rstrip(".:")
    if len(candidate) < _SHORTEST_ADDRESS:
        return found[0]
    try:
        ipaddress.ip_address(candidate)
    except ValueError:
        return found[0]
    return "[IP]" + found[0][len(candidate) :]
