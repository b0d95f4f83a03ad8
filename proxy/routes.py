"""The routes that are served, and of each the fields that reach the engine; all else is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from proxy.content import check_input, check_messages, check_tools

_SAMPLING = frozenset(
    [
        "frequency_penalty",
        "ignore_eos",
        "include_stop_str_in_output",
        "logit_bias",
        "min_p",
        "presence_penalty",
        "repetition_penalty",
        "seed",
        "skip_special_tokens",
        "stop",
        "stop_token_ids",
        "temperature",
        "top_k",
        "top_p",
    ]
)
_ALWAYS = frozenset(("cache_salt", "model", "stream"))
_COMPLETIONS = (
    _SAMPLING
    | _ALWAYS
    | frozenset(
        [
            "add_special_tokens",
            "allowed_token_ids",
            "bad_words",
            "echo",
            "logprob_token_ids",
            "logprobs",
            "max_tokens",
            "min_tokens",
            "n",
            "prompt_logprobs",
            "response_format",
            "return_token_ids",
            "return_tokens_as_token_ids",
            "spaces_between_special_tokens",
            "stream_options",
            "structured_outputs",
            "truncate_prompt_tokens",
            "truncation_side",
        ]
    )
)
_TEMPLATE = frozenset(
    ["add_generation_prompt", "add_special_tokens", "chat_template_kwargs", "continue_final_message", "tools"]
)


@dataclass(frozen=True)
class Route:
    """One route of the engine."""

    path: str
    fields: frozenset[str]
    """Fields handed to the engine. What is not here never reaches it."""
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


_SERVED = (
    Route(
        "/v1/chat/completions",
        _COMPLETIONS
        | _TEMPLATE
        | frozenset(
            [
                "documents",
                "include_reasoning",
                "max_completion_tokens",
                "messages",
                "parallel_tool_calls",
                "reasoning_effort",
                "thinking_token_budget",
                "tool_choice",
                "top_logprobs",
            ]
        ),
        checks=(check_messages, check_tools),
    ),
    Route("/v1/completions", _COMPLETIONS | frozenset(("prompt", "suffix"))),
    Route(
        "/v1/responses",
        _SAMPLING
        | _ALWAYS
        | frozenset(
            [
                "chat_template_kwargs",
                "include",
                "include_reasoning",
                "input",
                "instructions",
                "max_output_tokens",
                "max_tool_calls",
                "parallel_tool_calls",
                "reasoning",
                "structured_outputs",
                "text",
                "tool_choice",
                "tools",
                "top_logprobs",
                "truncation",
            ]
        ),
        end=b"event: response.completed\n",
        named_events=True,
        # The engine would keep answers, and hand them to whoever knows their id.
        fixed=MappingProxyType({"store": False}),
        checks=(check_input, check_tools),
    ),
    Route(
        "/v1/messages",
        _ALWAYS
        | frozenset(
            [
                "chat_template_kwargs",
                "max_tokens",
                "messages",
                "output_config",
                "stop_sequences",
                "system",
                "temperature",
                "thinking",
                "tool_choice",
                "tools",
                "top_k",
                "top_p",
            ]
        ),
        end=b"event: message_stop\n",
        named_events=True,
        checks=(check_messages, check_tools),
    ),
    Route(
        "/v1/messages/count_tokens",
        frozenset(
            ["chat_template_kwargs", "messages", "model", "system", "thinking", "tool_choice", "tools"]
        ),
        generates=False,
        checks=(check_messages, check_tools),
    ),
    Route(
        "/tokenize",
        _TEMPLATE | frozenset(["messages", "model", "prompt", "return_token_strs"]),
        generates=False,
        checks=(check_messages, check_tools),
    ),
    Route("/detokenize", frozenset(("model", "tokens")), generates=False),
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
