"""Writes a whole answer that a refusal gate stopped in the form in which each API tells a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final
from uuid import uuid4

from steering_kernels.vllm_plugin.core.refusal_stop import refusal_of

_OF_TOKENS: Final = ("logprobs", "token_ids", "routed_experts")
"""Fields of a choice that describe its tokens; those of a stopped request are not shown."""


def refused_answer(path: str, body: bytes, nonce: str, text: str) -> bytes | None:
    """The answer with its stopped choices replaced by refusals; None if the route has no form for one.

    ``text``: the refusal on routes with a single answer. Choices carry their own in their stop reason.
    Raises ValueError or LookupError for a body that is not an answer of the route.
    """
    write = _WRITERS.get(path)
    return None if write is None else json.dumps(write(json.loads(body), nonce, text)).encode()


def clear_choice(choice: dict[str, Any]) -> None:
    """End a stopped choice the normal way, without the mark and without anything about its tokens."""
    choice.update(finish_reason="stop", stop_reason=None)
    choice.update({name: None for name in _OF_TOKENS if name in choice})


def refusal_item(text: str) -> dict[str, Any]:
    """The output message of `/v1/responses` that refuses."""
    content = [{"type": "refusal", "refusal": text}]
    return {
        "id": f"msg_{uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": content,
    }


def refused_response(response: dict[str, Any], output: list[dict[str, Any]]) -> dict[str, Any]:
    """A response of `/v1/responses` that ended with a refusal."""
    response.update(status="completed", incomplete_details=None, output=output)
    if "output_messages" in response:
        response["output_messages"] = None
    return response


def _chat(answer: dict[str, Any], nonce: str, _: str) -> dict[str, Any]:
    for choice in answer["choices"]:
        if (own := refusal_of(choice.get("stop_reason"), nonce)) is not None:
            clear_choice(choice)
            choice["message"] = {"role": choice["message"]["role"], "content": None, "refusal": own}
    return answer


def _completion(answer: dict[str, Any], nonce: str, _: str) -> dict[str, Any]:
    for choice in answer["choices"]:
        if (own := refusal_of(choice.get("stop_reason"), nonce)) is not None:
            clear_choice(choice)
            choice["text"] = own
    return answer


def _response(answer: dict[str, Any], _: str, text: str) -> dict[str, Any]:
    return refused_response(answer, [refusal_item(text)])


def _message(answer: dict[str, Any], _: str, text: str) -> dict[str, Any]:
    answer.update(content=[{"type": "text", "text": text}], stop_reason="refusal", stop_sequence=None)
    return answer


_WRITERS: Final[Mapping[str, Callable[[dict[str, Any], str, str], dict[str, Any]]]] = {
    "/v1/chat/completions": _chat,
    "/v1/completions": _completion,
    "/v1/responses": _response,
    "/v1/messages": _message,
}
