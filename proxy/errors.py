"""What the gateway answers when it does not serve: a status, a stable code, and OpenAI's shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from interpretops.errors import InterpretOpsError


class Refusal(InterpretOpsError):  # noqa: N818 - a refusal is an answer, not a fault
    """A request that gets an error instead of an answer. The message is for the caller."""

    public = True
    retry: ClassVar[bool | None] = False
    """Sent as ``x-should-retry``; None leaves the decision to the client."""

    def __init__(
        self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.headers = {} if headers is None else headers


class InvalidRequest(Refusal):
    """The body is not a request this gateway understands."""

    code = "invalid_request"
    status = 400


class FieldNotAllowed(Refusal):
    """The body or a header sets something that a client may not set."""

    code = "field_not_allowed"
    status = 400


class PolicyConflict(Refusal):
    """Two places of one request name different policies."""

    code = "policy_conflict"
    status = 400


class UnknownPolicy(Refusal):
    """No such policy, or none that this caller may choose."""

    code = "unknown_policy"
    status = 400


class PolicyForbidden(Refusal):
    """The binding is mandatory, and the caller asked for something else."""

    code = "policy_mandatory"
    status = 403


class InvalidKey(Refusal):
    """No key, a wrong one, or one that is not for this listener."""

    code = "invalid_api_key"
    status = 401


class KeysUnavailable(Refusal):
    """The file of keys has been broken for too long to trust the keys that were read from it."""

    code = "keys_unavailable"
    status = 503
    retry = True


class NotPermitted(Refusal):
    """The key is known, and not allowed to do this."""

    code = "not_permitted"
    status = 403


class ForeignPage(Refusal):
    """Without keys, a request that a web page of a foreign name may have sent."""

    code = "foreign_page"
    status = 403


class UnknownModel(Refusal):
    """The engine does not serve this model."""

    code = "model_not_found"
    status = 404


class UnknownRoute(Refusal):
    """This path is not guarded, so it is not served."""

    code = "unknown_route"
    status = 404


class NotGuarded(Refusal):
    """The engine has this route, and no policy can be proven on it."""

    code = "route_not_guarded"
    status = 403


class MethodNotAllowed(Refusal):
    """The path exists under another method."""

    code = "method_not_allowed"
    status = 405


class TooLarge(Refusal):
    """The body exceeds the configured size."""

    code = "request_too_large"
    status = 413


class SlowRequest(Refusal):
    """The body did not arrive in time."""

    code = "request_timeout"
    status = 408


class RateLimited(Refusal):
    """The tenant uses more than it may at this moment."""

    code = "rate_limit_exceeded"
    status = 429
    retry = True

    def __init__(self, message: str, *, retry_after_s: float, headers: Mapping[str, str]) -> None:
        wait = {
            "Retry-After": str(math.ceil(retry_after_s)),
            "retry-after-ms": str(math.ceil(retry_after_s * 1000)),
        }
        super().__init__(message, headers={**headers, **wait})


class BudgetSpent(Refusal):
    """The tenant has used what it may in this period."""

    code = "insufficient_quota"
    status = 429


class LimitsUnavailable(Refusal):
    """What the tenant has used cannot be known now, and nothing may be served uncounted."""

    code = "limits_unavailable"
    status = 503
    retry = True


class UnsupportedMedia(Refusal):
    """The body is not plain UTF-8 JSON."""

    code = "unsupported_media_type"
    status = 415


class PolicyUnavailable(Refusal):
    """The policy is known, but no revision of it is loaded."""

    code = "policy_unavailable"
    status = 503
    retry = None


class AuditUnavailable(Refusal):
    """The audit log cannot be written, and nothing may happen unrecorded."""

    code = "audit_unavailable"
    status = 503
    retry = True


class EngineNotReady(Refusal):
    """The engine is not there, or has not been proven to steer."""

    code = "engine_not_ready"
    status = 503
    retry = True


class EngineFailed(Refusal):
    """The engine failed while it answered."""

    code = "engine_failed"
    status = 502
    retry = None


class EngineTimeout(Refusal):
    """The engine lives, but did not answer in the time that it has."""

    code = "engine_timeout"
    status = 504
    retry = None


class AnswerTooLarge(Refusal):
    """The answer must be held whole until it is proven, and exceeds what is held of one."""

    code = "answer_too_large"
    status = 400


class ReceiptFailed(Refusal):
    """The engine did not prove that the demanded revision steered the answer; the answer is withheld."""

    code = "receipt_failed"
    status = 502


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's shape."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_headers(refusal: Refusal) -> dict[str, str]:
    """Headers that tell OpenAI's clients whether trying again helps."""
    headers = dict(refusal.headers)
    if refusal.retry is not None:
        headers["x-should-retry"] = "true" if refusal.retry else "false"
    if refusal.status == 503:
        headers["Retry-After"] = "1"
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers
