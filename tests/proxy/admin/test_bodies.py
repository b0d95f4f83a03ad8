"""Bodies of admin requests: each error is one line that names the field."""

from typing import Any

import pytest

from proxy.admin.bodies import Promotion, ResolveRequest, Rollback
from proxy.errors import InvalidRequest

NAMED = "0123456789ab"


@pytest.mark.parametrize(
    ("kind", "body", "param", "reported"),
    [
        (Promotion, {}, "revision", "revision is missing: name the candidate that you reviewed"),
        (Promotion, {"revision": 12}, "revision", "revision = 12, but must be a valid string"),
        (Promotion, {"revision": NAMED[:11]}, "revision", "revision must be 12 to 64 hex digits"),
        (Promotion, {"revision": NAMED.upper()}, "revision", "revision must be 12 to 64 hex digits"),
        (
            Promotion,
            {"revision": NAMED, "to": "shade"},
            "to",
            "to = 'shade', but must be 'active' or 'shadow'",
        ),
        (Promotion, {"revision": NAMED, "force": True}, "force", "force is not a known key; known are "),
        (Promotion, {"revision": NAMED, "override": {"by": "a"}}, "override.why", "override.why is missing"),
        (Promotion, {"revision": NAMED, "override": 1}, "override", "override = 1, but must be a mapping"),
        (
            Promotion,
            {"revision": NAMED, "override": {"by": "a", "why": " "}},
            "override.why",
            "override.why must be a string of at most 1000 characters",
        ),
        (
            Promotion,
            {"revision": NAMED, "override": {"by": "a" * 1001, "why": "x"}},
            "override.by",
            "override.by must be a string of at most 1000 characters",
        ),
        (Rollback, {"to": "shadow"}, "to", "to is not a known key; known are revision"),
        (ResolveRequest, {"polciy": "calm"}, "polciy", "polciy is not a known key; did you mean 'policy'?"),
        (
            ResolveRequest,
            {"route": "/v1/x"},
            "route",
            "route = '/v1/x', but must be one of /v1/chat/completions",
        ),
        (ResolveRequest, {"model": 1}, "model", "model = 1, but must be a valid string"),
    ],
)
def test_error_is_one_line_that_names_the_field(
    kind: Any, body: dict[str, Any], param: str, reported: str
) -> None:
    """Unknown, missing, ill-typed or too long fields: the message says what would be valid."""
    with pytest.raises(InvalidRequest) as raised:
        kind.read(body)
    assert raised.value.param == param
    assert str(raised.value).startswith(reported)
    assert "\n" not in str(raised.value)


def test_missing_fields_have_defaults() -> None:
    """Defaults: promote to active, roll back to the previous revision, resolve a chat request."""
    promotion = Promotion.read({"revision": NAMED, "override": {"by": "ada", "why": "outage"}})
    assert promotion.to == "active"
    assert promotion.override.model_dump() == {"by": "ada", "why": "outage"}
    assert Rollback.read({}).revision is None
    assert ResolveRequest.read({}).route == "/v1/chat/completions"
