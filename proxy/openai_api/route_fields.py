"""Every field that reaches the engine, with the reason why it cannot carry anything unsteered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Field:
    """One field of a body."""

    reason: str
    """Why it cannot carry anything that was computed without the demanded policy, for the reference page."""
    text: bool = False
    """Whether its strings become text of the prompt: special tokens are kept out of them."""
    reads_prompt: bool = False
    """Whether it has the engine tell what it computed at positions of the prompt. Refused, in any value that
    is not off, under a policy that acts otherwise there than at generated positions."""

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("a field needs a reason")


Fields = Mapping[str, Field]


def _because(reason: str, *names: str, text: bool = False, reads_prompt: bool = False) -> dict[str, Field]:
    return {name: Field(reason, text=text, reads_prompt=reads_prompt) for name in names}


_WRITTEN: Final = "text of the prompt: what the caller wrote itself, without special tokens"
_PICKS: Final = "decides which token follows from the steered distribution; nothing of it is told"
_ENDS: Final = "decides where the answer ends; the answer itself is steered"
_TOLD: Final = "tells of generated positions alone, each after the policy's edits"
_SHOWS: Final = "how the answer's tokens are written; computes nothing"
_PROMPT: Final = "how the prompt is put together from what the caller wrote; the gates read what comes of it"
_FORM: Final = (
    "allows only answers of a form; each token comes from the steered distribution (what the form itself "
    "makes the answer say, a gate over the prompt does not read: docs/threat-model.md)"
)
_RENDERED: Final = f"{_FORM}; some templates write it into the prompt"
_READ: Final = (
    "tells log-probabilities or ranks at positions of the prompt, where a gate that opens at its end has "
    "edited nothing: refused under a policy that acts otherwise there than at generated positions"
)

_SAMPLING = (
    _because(
        _PICKS,
        *("frequency_penalty", "logit_bias", "min_p", "presence_penalty", "repetition_penalty", "seed"),
        *("temperature", "top_k", "top_p"),
    )
    | _because(_ENDS, "ignore_eos", "stop", "stop_token_ids")
    | _because(_SHOWS, "include_stop_str_in_output", "skip_special_tokens")
)
_ALWAYS = (
    _because("keeps blocks of the prefix cache apart, beside tenant and revision", "cache_salt")
    | _because("names the model, and by its alias the policy", "model")
    | _because("how the answer is sent", "stream")
)
_TEMPLATE = _because(
    _PROMPT, "add_generation_prompt", "add_special_tokens", "continue_final_message"
) | _because(_WRITTEN, "chat_template_kwargs", "tools", text=True)
_COMPLETIONS = (
    _SAMPLING
    | _ALWAYS
    | _because(_PICKS, "allowed_token_ids", "bad_words", "n")
    | _because(_ENDS, "max_tokens", "min_tokens")
    | _because(_TOLD, "logprob_token_ids", "logprobs")
    | _because(_SHOWS, "return_tokens_as_token_ids", "spaces_between_special_tokens")
    | _because("ids of the caller's own prompt and of the steered answer", "return_token_ids")
    | _because(_PROMPT, "add_special_tokens", "truncate_prompt_tokens", "truncation_side")
    | _because(_FORM, "structured_outputs")
    | _because("counts of tokens", "stream_options")
)
CHAT: Final[Fields] = (
    _COMPLETIONS
    | _TEMPLATE
    | _because(_WRITTEN, "documents", "messages", text=True)
    | _because(_RENDERED, "response_format", "tool_choice", text=True)
    | _because(_PROMPT, "reasoning_effort")
    | _because(_ENDS, "max_completion_tokens", "thinking_token_budget")
    | _because(_SHOWS, "include_reasoning", "parallel_tool_calls")
    | _because(_TOLD, "top_logprobs")
    | _because(_READ, "prompt_logprobs", reads_prompt=True)
    # The engine then sets prompt_logprobs to top_logprobs, which is 0 and not off where nothing was said.
    | _because(f"{_READ} (on this route also without logprobs)", "echo", reads_prompt=True)
)
COMPLETIONS: Final[Fields] = (
    _COMPLETIONS
    | _because(_FORM, "response_format")
    | _because(f"{_WRITTEN}; token numbers are refused where they are special", "prompt", text=True)
    | _because(_WRITTEN, "suffix", text=True)
    | _because(_READ, "prompt_logprobs", reads_prompt=True)
    | _because(f"repeats the caller's own prompt. With logprobs: {_READ}", "echo", reads_prompt=True)
)
RESPONSES: Final[Fields] = (
    _SAMPLING
    | _ALWAYS
    | _because(_WRITTEN, "chat_template_kwargs", "input", "instructions", "tools", text=True)
    | _because(_RENDERED, "text", "tool_choice", text=True)
    | _because(_FORM, "structured_outputs")
    | _because(f"which parts are told; of log-probabilities: {_TOLD}", "include")
    | _because(_SHOWS, "include_reasoning", "parallel_tool_calls")
    | _because(_ENDS, "max_output_tokens", "max_tool_calls")
    | _because(_PROMPT, "reasoning", "truncation")
    | _because(_TOLD, "top_logprobs")
)
_COUNT = (
    _because(_WRITTEN, "chat_template_kwargs", "messages", "system", "tools", text=True)
    | _because(_RENDERED, "tool_choice", text=True)
    | _because("names the model", "model")
    | _because(_PROMPT, "thinking")
)
COUNT: Final[Fields] = _COUNT
MESSAGES: Final[Fields] = (
    _COUNT
    | _ALWAYS
    | _because(_ENDS, "max_tokens", "stop_sequences")
    | _because(_RENDERED, "output_config", text=True)
    | _because(_PICKS, "temperature", "top_k", "top_p")
)
_COUNTED: Final = "no model runs on this route"
TOKENIZE: Final[Fields] = (
    _because(f"{_COUNTED}; {_WRITTEN}", "chat_template_kwargs", "messages", "prompt", "tools", text=True)
    | _because(_COUNTED, "add_generation_prompt", "add_special_tokens", "continue_final_message", "model")
    | _because(_COUNTED, "return_token_strs")
)
DETOKENIZE: Final[Fields] = _because(_COUNTED, "model", "tokens")
