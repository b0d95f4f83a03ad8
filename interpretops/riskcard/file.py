"""The card's file: strict JSON with a checksum, so that a changed number or revision is detected."""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ValidationError

from interpretops.errors import InterpretOpsError
from interpretops.files.atomic_file import write_atomically
from interpretops.files.json_file import read_json_object
from interpretops.files.schema_faults import describe_faults
from interpretops.files.strict_yaml import Document
from interpretops.riskcard.card import RiskCard
from interpretops.riskcard.older import as_current

CHECKSUM = "sha256"


class RiskCardError(InterpretOpsError):
    """A Risk Card is unreadable, was changed, or belongs to another revision."""

    code: ClassVar[str] = "invalid_risk_card"
    status: ClassVar[int] = 400


def save_card(card: RiskCard, path: Path) -> None:
    """Write a card atomically; the same card gives the same bytes."""
    text = json.dumps(card_document(card), indent=1, sort_keys=True, ensure_ascii=False)
    write_atomically(path, (text + "\n").encode())


def card_document(card: RiskCard) -> dict[str, Any]:
    """The content of a card's file: the card and its checksum."""
    content: dict[str, Any] = card.model_dump(mode="json", exclude_none=True)
    return content | {CHECKSUM: _checksum(content)}


def load_card(path: Path, *, revision: str | None = None) -> RiskCard:
    """Read a card; with ``revision``, also refuse the card of any other revision.

    The checksum detects edits and accidents, not forgery. To authenticate a card, sign its file.
    """
    content = read_json_object(path, RiskCardError)
    given = content.pop(CHECKSUM, None)
    try:
        card = RiskCard.model_validate_json(json.dumps(as_current(content)))
    except ValidationError as error:
        document = Document(str(path), content)
        raise RiskCardError("\n".join(describe_faults(error, document, RiskCard))) from error
    if given != _checksum(content):
        raise RiskCardError(
            f"{path}: {CHECKSUM} = {given!r}, but the content has another; the card was changed after it was "
            "made: make it again with `mechctl eval`"
        )
    if revision is not None and card.policy.revision != revision:
        raise RiskCardError(
            f"{path}: policy.revision = {card.policy.revision[:12]}…, but the policy compiles to "
            f"{revision[:12]}…; measure that revision with `mechctl eval`"
        )
    return card


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
