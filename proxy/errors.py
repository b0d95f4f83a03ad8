"""The gateway's errors: each has an HTTP status and a stable code, and is sent in OpenAI's error format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from interpretops.errors import InterpretOpsError


class Refusal(InterpretOpsError):  # noqa: N818 - a refusal is a response, not a fault
    """The request gets an error instead of an answer. Callers may see the message."""

    public = True
    retry: ClassVar[bool | None] = False
    """Sent as ``x-should-retry``. None: leave the decision to the client."""

    def __init__(
        self, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.headers = {} if headers is None else headers


class InvalidRequest(Refusal):
    """The request body is malformed or holds an unsupported value."""

    code = "invalid_request"
    status = 400


class FieldNotAllowed(Refusal):
    """The body or a header sets a field that clients may not set."""

    code = "field_not_allowed"
    status = 400


class PolicyConflict(Refusal):
    """One request names two different policies."""

    code = "policy_conflict"
    status = 400


class UnknownPolicy(Refusal):
    """The policy does not exist, or this caller may not choose it."""

    code = "unknown_policy"
    status = 400


class PolicyForbidden(Refusal):
    """The binding is mandatory, but the caller asked for another policy."""

    code = "policy_mandatory"
    status = 403


class InvalidKey(Refusal):
    """The API key is missing, wrong, or not valid on this listener."""

    code = "invalid_api_key"
    status = 401


class KeysUnavailable(Refusal):
    """The key file has been unreadable for so long that the keys read earlier are no longer trusted."""

    code = "keys_unavailable"
    status = 503
    retry = True


class NotPermitted(Refusal):
    """The key is valid but not allowed to do this."""

    code = "not_permitted"
    status = 403


class ForeignPage(Refusal):
    """No keys are required, and a web page of another site may have sent the request."""

    code = "foreign_page"
    status = 403


class UnknownModel(Refusal):
    """The engine does not serve this model."""

    code = "model_not_found"
    status = 404


class UnknownRoute(Refusal):
    """The gateway does not guard this path, so it does not serve it."""

    code = "unknown_route"
    status = 404


class NotGuarded(Refusal):
    """The engine has this route, but no receipt can prove a policy on it."""

    code = "route_not_guarded"
    status = 403


class MethodNotAllowed(Refusal):
    """The path exists, but not for this method."""

    code = "method_not_allowed"
    status = 405


class TooLarge(Refusal):
    """The body is larger than the configured limit."""

    code = "request_too_large"
    status = 413


class SlowRequest(Refusal):
    """The body did not arrive in time."""

    code = "request_timeout"
    status = 408


class RateLimited(Refusal):
    """The tenant has reached a rate or concurrency limit."""

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
    """The tenant has used up its token budget for this period."""

    code = "insufficient_quota"
    status = 429


class LimitsUnavailable(Refusal):
    """The tenant's usage cannot be read now, and no request may be served uncounted."""

    code = "limits_unavailable"
    status = 503
    retry = True


class UnsupportedMedia(Refusal):
    """The body is not plain UTF-8 JSON."""

    code = "unsupported_media_type"
    status = 415


class PolicyUnavailable(Refusal):
    """The policy exists, but no revision of it is loaded."""

    code = "policy_unavailable"
    status = 503
    retry = None


class AuditUnavailable(Refusal):
    """The audit log cannot be written, and nothing may happen without a record."""

    code = "audit_unavailable"
    status = 503
    retry = True


class EngineNotReady(Refusal):
    """The engine is unreachable, or has not yet proven that it steers."""

    code = "engine_not_ready"
    status = 503
    retry = True


class EngineFailed(Refusal):
    """The engine failed while answering."""

    code = "engine_failed"
    status = 502
    retry = None


class EngineTimeout(Refusal):
    """The engine is running but did not answer within the timeout."""

    code = "engine_timeout"
    status = 504
    retry = None


class AnswerTooLarge(Refusal):
    """The answer must be buffered until its receipt is checked, and is larger than the buffer limit."""

    code = "answer_too_large"
    status = 400


class ReceiptFailed(Refusal):
    """The engine did not prove that the required revision steered the answer, so the answer is withheld."""

    code = "receipt_failed"
    status = 502


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's format."""
    kind = "server_error" if status >= 500 else _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_headers(refusal: Refusal) -> dict[str, str]:
    """Headers that tell OpenAI clients whether to retry."""
    headers = dict(refusal.headers)
    if refusal.retry is not None:
        headers["x-should-retry"] = "true" if refusal.retry else "false"
    if refusal.status == 503:
        headers["Retry-After"] = "1"
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers
