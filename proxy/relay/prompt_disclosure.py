"""Refuses to return values computed at prompt positions that the policy leaves unedited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from proxy.errors import FieldNotAllowed
from proxy.openai_api.routes import Route
from proxy.policies.policy_files import Revision


def prompt_reading_field(route: Route, body: Mapping[str, Any]) -> str | None:
    """The field that makes the engine return log-probabilities of the prompt; None if there is none.

    Off means absent, null, or false for `echo`. `prompt_logprobs: 0` is on: it returns each token's own
    log-probability and rank, which is enough to guess text.
    """
    for name, field in route.fields.items():
        value = body.get(name)
        if not field.reads_prompt or value is None:
            continue
        if name == "echo" and (value is False or _echoes_text_alone(route, body)):
            continue
        return name
    return None


def may_disclose_prompt(route: Route, body: Mapping[str, Any], revision: Revision | None) -> bool:
    """Whether ``revision`` (None: unsteered) allows what the request asks about its prompt."""
    return revision is None or revision.steers_prompt or prompt_reading_field(route, body) is None


def check_prompt_disclosure(route: Route, body: Mapping[str, Any], revision: Revision | None) -> None:
    """Raise `FieldNotAllowed` unless `may_disclose_prompt`.

    Otherwise a caller could send an answer as a prompt and read the model's unsteered probabilities for it.
    """
    if may_disclose_prompt(route, body, revision):
        return
    assert revision is not None
    name = prompt_reading_field(route, body)
    raise FieldNotAllowed(
        f"{name} returns log-probabilities of the prompt, where policy {revision.policy!r} acts "
        f"differently than on the answer; remove {name}, or ask for logprobs of the answer",
        param=name,
    )


def _echoes_text_alone(route: Route, body: Mapping[str, Any]) -> bool:
    """On completions, echo without logprobs returns only text. On chat the engine adds log-probabilities."""
    return "top_logprobs" not in route.fields and body.get("logprobs") is None
