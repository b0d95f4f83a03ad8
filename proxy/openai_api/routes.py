"""The served routes, and for each the fields that reach the engine. Everything else is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from proxy.openai_api import route_fields
from proxy.openai_api.content import check_input, check_messages, check_tools
from proxy.openai_api.template_kwargs import check_template_kwargs


@dataclass(frozen=True)
class Route:
    """One route of the engine."""

    path: str
    fields: route_fields.Fields
    """Fields passed to the engine, each with its reason. No other field reaches the engine."""
    generates: bool = True
    """Whether the model runs, so that a revision must be required and proven."""
    end: bytes = b"data: [DONE]"
    """Start of the event that ends a complete stream."""
    named_events: bool = False
    """Whether events of this route, errors included, are named."""
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Fields that the gateway always sets itself."""
    checks: tuple[Callable[[Mapping[str, Any]], None], ...] = ()
    """Checks for values that could make the engine fetch a URL, or that are not text."""


_CHECKS = (check_messages, check_tools, check_template_kwargs)

_SERVED = (
    Route("/v1/chat/completions", route_fields.CHAT, checks=_CHECKS),
    Route("/v1/completions", route_fields.COMPLETIONS),
    Route(
        "/v1/responses",
        route_fields.RESPONSES,
        end=b"event: response.completed\n",
        named_events=True,
        # Otherwise the engine would store answers and return them to anyone who knows their id.
        fixed=MappingProxyType({"store": False}),
        checks=(check_input, check_tools, check_template_kwargs),
    ),
    Route(
        "/v1/messages",
        route_fields.MESSAGES,
        end=b"event: message_stop\n",
        named_events=True,
        checks=_CHECKS,
    ),
    Route(
        "/v1/messages/count_tokens",
        route_fields.COUNT,
        generates=False,
        checks=_CHECKS,
    ),
    Route(
        "/tokenize",
        route_fields.TOKENIZE,
        generates=False,
        checks=_CHECKS,
    ),
    Route("/detokenize", route_fields.DETOKENIZE, generates=False),
)
ROUTES: Final[Mapping[str, Route]] = MappingProxyType({route.path: route for route in _SERVED})
"""The served routes, by path."""

DROPPED: Final = frozenset(
    ["metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user", "verbosity"]
)
"""OpenAI fields that mean nothing to the engine: accepted but not passed on."""

UNGUARDED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "/v1/embeddings": "embeddings are pooled activations, for which no receipt proves the policy",
        "/v1/audio/transcriptions": "audio is not served",
        "/v1/audio/translations": "audio is not served",
        "/v1/rerank": "scores come from pooled activations, for which no receipt proves the policy",
        "/v1/score": "scores come from pooled activations, for which no receipt proves the policy",
        "/v1/realtime": "its requests cannot be checked one by one, so no revision can be required for each",
        "/v1/responses/{id}": "answers are not stored",
        "/v1/chat/completions/batch": "its requests share one receipt",
        "/inference/v1/generate": "it accepts raw tokens and so bypasses the gateway's checks",
        "/pooling": "pooled activations carry no receipt that proves the policy",
        "/classify": "pooled activations carry no receipt that proves the policy",
        "/invocations": "it forwards to other routes, depending on the body",
    }
)
"""Engine routes that are refused by name, and why. Any other route is unknown to the gateway."""
