"""Refuses to tell what the model computed at positions of a prompt that the policy leaves unedited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.errors import FieldNotAllowed
from proxy.openai_api.routes import Route
from proxy.policies.policy_files import Revision


def field_that_reads(route: Route, body: Mapping[str, Any]) -> str | None:
    """The field by which the engine would tell log-probabilities of the prompt; None when it tells none.

    Off is only what is left out, null, or for `echo` false: `prompt_logprobs: 0` tells each token's own
    log-probability and its rank, which is enough to guess by.
    """
    for name, field in route.fields.items():
        value = body.get(name)
        if not field.reads_prompt or value is None:
            continue
        if name == "echo" and (value is False or _echoes_text_alone(route, body)):
            continue
        return name
    return None


def may_read(route: Route, body: Mapping[str, Any], revision: Revision | None) -> bool:
    """Whether ``revision`` (None: unsteered) lets the engine tell what a request asks of its prompt."""
    return revision is None or revision.steers_prompt or field_that_reads(route, body) is None


def check_reading(route: Route, body: Mapping[str, Any], revision: Revision | None) -> None:
    """Raise `FieldNotAllowed` unless `may_read`.

    An answer sent as a prompt would be read there, token by token, as the model gives it without the policy.
    """
    if may_read(route, body, revision):
        return
    assert revision is not None
    name = field_that_reads(route, body)
    raise FieldNotAllowed(
        f"{name} has the engine tell log-probabilities of the prompt, where policy {revision.policy!r} acts "
        f"otherwise than on an answer; leave {name} out, or ask for logprobs of the answer",
        param=name,
    )


def _echoes_text_alone(route: Route, body: Mapping[str, Any]) -> bool:
    """On completions an echo without logprobs is the prompt's text; on chat the engine adds the numbers."""
    return "top_logprobs" not in route.fields and body.get("logprobs") is None
