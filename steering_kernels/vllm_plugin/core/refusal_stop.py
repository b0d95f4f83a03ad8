"""Stops constrained requests whose refusal gate is open, and marks them for the front end.

A grammar leaves the model no words to refuse with: it would go on in the form that the grammar asks for, to
the token limit. Requests without one are left alone, because there the model refuses in its own words.
"""

from __future__ import annotations

from typing import Any, Final

from interpretops.engine_api import NONCE_KEY
from steering_kernels.vllm_plugin.core.registry import Registry

_MARK: Final = "interpretops-stopped"


def refusal_mark(nonce: str) -> str:
    """Begins the stop reason of a stopped request; its text follows.

    The nonce keeps a client from naming the mark as one of its stop strings.
    """
    return f"{_MARK}:{nonce}:"


def refusal_of(stop_reason: Any, nonce: str) -> str | None:
    """The text in the stop reason of a stopped request; None for any other stop reason."""
    mark = refusal_mark(nonce)
    return stop_reason.removeprefix(mark) if str(stop_reason).startswith(mark) else None


def is_constrained(request: Any) -> bool:
    """Whether something keeps a vLLM `Request` from refusing in its own words.

    That is a grammar (JSON, regex, choice, a forced tool) or a list of the only tokens that are allowed.
    """
    params = request.sampling_params
    return bool(request.use_structured_output or (params is not None and params.allowed_token_ids))


def stop_refused(request: Any, registry: Registry, gate: int, tokens: list[int]) -> list[int]:
    """End a request at this step's first token. Returns the tokens that are left: one, or none.

    One is kept because vLLM's API server skips outputs without tokens. The front end shows none of it.
    """
    from vllm.v1.request import RequestStatus

    nonce = request.sampling_params.extra_args[NONCE_KEY]
    request.status = RequestStatus.FINISHED_STOPPED
    request.stop_reason = refusal_mark(nonce) + registry.refusal(request.request_id, gate)
    return tokens[:1]
