"""Hooks for schemathesis: whatever it asks, a real model answers in a few tokens."""

from typing import Any

import schemathesis

_LIMITS = {
    "/v1/chat/completions": ("max_tokens", "max_completion_tokens", "min_tokens"),
    "/v1/completions": ("max_tokens", "min_tokens"),
    "/v1/responses": ("max_output_tokens",),
    "/v1/messages": ("max_tokens",),
}


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Cap each limit that is a number, and set one where there is none; wrong ones stay as they are."""
    names, body = _LIMITS.get(case.operation.path, ()), case.body
    if not names or not isinstance(body, dict):
        return
    for name in names:
        given = body.get(name)
        if isinstance(given, int) and given > 4:
            body[name] = 4
    if all(body.get(name) is None for name in names):
        body[names[0]] = 4
