"""The request bodies of the admin API. Each error is one line that names the field."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from interpretops.files.schema_faults import describe_faults
from interpretops.files.strict_yaml import Document, show_path
from proxy.errors import InvalidRequest
from proxy.openai_api.routes import ROUTES

_MAX_REASON = 1000
_REVISION = re.compile(r"[0-9a-f]{12,64}")


class AdminBody(BaseModel):
    """A JSON object with the declared fields and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @classmethod
    def read(cls, data: dict[str, Any]) -> Self:
        """Validate a body. Raises `InvalidRequest` with the first wrong field and its valid values."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            source = "the body"
            line = describe_faults(error, Document(source, data), cls)[0].removeprefix(f"{source}: ")
            place = show_path(error.errors(include_url=False)[0]["loc"])
            raise InvalidRequest(cls.remedy(place, line), param=place) from None

    @classmethod
    def remedy(cls, _place: str, line: str) -> str:
        """Add a remedy to an error line."""
        return line


def _check_hex(text: str) -> str:
    if not _REVISION.fullmatch(text):
        raise ValueError("must be 12 to 64 hex digits")
    return text


def _check_reason(text: str) -> str:
    if not text.strip() or len(text) > _MAX_REASON:
        raise ValueError(f"must be a string of at most {_MAX_REASON} characters")
    return text


def _check_route(path: str) -> str:
    if path not in ROUTES:
        raise ValueError(f"= {path!r}, but must be one of {', '.join(ROUTES)}")
    return path


NamedRevision = Annotated[str, AfterValidator(_check_hex)]
Reason = Annotated[str, AfterValidator(_check_reason)]


class Override(AdminBody):
    """Who promotes without a passing Risk Card, and why."""

    by: Reason
    why: Reason


class Promotion(AdminBody):
    """Activates a candidate, or runs it in shadow of the active one."""

    revision: NamedRevision
    """The candidate that was reviewed; files can change meanwhile."""
    to: Literal["active", "shadow"] = "active"
    override: Override | None = None

    @classmethod
    def remedy(cls, place: str, line: str) -> str:
        """Say where to find the revision."""
        if place != "revision" or "missing" not in line:
            return line
        return (
            f"{line}: name the candidate that you reviewed, by 12 or more hex digits of `candidate` in "
            'GET /admin/policies, as {"revision": "0123456789ab"}'
        )


class Rollback(AdminBody):
    """Restores the previous revision."""

    revision: NamedRevision | None = None
    """The revision to roll back to."""


class ResolveRequest(AdminBody):
    """A dry run: which policy would this request get?"""

    model: str | None = None
    route: Annotated[str, AfterValidator(_check_route)] = "/v1/chat/completions"
    policy: str | None = None
    """As in X-Steering-Policy."""
    tenant: str | None = None
    key: str | None = None
    """The key's id."""
