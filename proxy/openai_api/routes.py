"""The routes that are served, and of each the fields that reach the engine; all else is refused."""

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
    """Fields handed to the engine, each with the reason why. What is not here never reaches it."""
    generates: bool = True
    """Whether the model runs, so that a revision must be demanded and proven."""
    end: bytes = b"data: [DONE]"
    """How the event begins that ends a stream cleanly."""
    named_events: bool = False
    """Whether the route's events have names, errors included."""
    fixed: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What the gateway sets itself, whatever the client says."""
    checks: tuple[Callable[[Mapping[str, Any]], None], ...] = ()
    """Looks at values that could make the engine reach out, or hold what is not text."""


_CHECKS = (check_messages, check_tools, check_template_kwargs)

_SERVED = (
    Route("/v1/chat/completions", route_fields.CHAT, checks=_CHECKS),
    Route("/v1/completions", route_fields.COMPLETIONS),
    Route(
        "/v1/responses",
        route_fields.RESPONSES,
        end=b"event: response.completed\n",
        named_events=True,
        # The engine would keep answers, and hand them to whoever knows their id.
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
"""What is served."""

DROPPED: Final = frozenset(
    ["metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user", "verbosity"]
)
"""Fields of OpenAI's that say nothing to the engine: accepted, and not passed on."""

UNGUARDED: Final[Mapping[str, str]] = MappingProxyType(
    {
        "/v1/embeddings": "embeddings are pooled activations, for which no receipt proves the policy",
        "/v1/audio/transcriptions": "audio is not served",
        "/v1/audio/translations": "audio is not served",
        "/v1/rerank": "scores come from pooled activations, for which no receipt proves the policy",
        "/v1/score": "scores come from pooled activations, for which no receipt proves the policy",
        "/v1/realtime": "its requests are not read one by one: no revision can be demanded of each",
        "/v1/responses/{id}": "answers are not stored",
        "/v1/chat/completions/batch": "its requests share one receipt",
        "/inference/v1/generate": "it takes tokens as they are, around what the gateway checks",
        "/pooling": "pooled activations carry no receipt that proves the policy",
        "/classify": "pooled activations carry no receipt that proves the policy",
        "/invocations": "it leads to other routes, chosen by the body",
    }
)
"""Routes of the engine that are refused by name, and why. Any other that it has is unknown here."""
