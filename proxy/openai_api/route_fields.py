"""Every field that reaches the engine, with the reason why it cannot carry unsteered content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Field:
    """One field of a body."""

    reason: str
    """Why it cannot carry anything computed without the required policy; for the reference page."""
    text: bool = False
    """Whether its strings become part of the prompt, so that special tokens must be neutralized."""
    reads_prompt: bool = False
    """Whether it makes the engine return values computed at prompt positions. Refused, unless off, under a
    policy that acts differently on the prompt than on generated tokens."""

    def __post_init__(self) -> None:
        if not self.reason.strip():
            raise ValueError("a field needs a reason")


Fields = Mapping[str, Field]


def _fields(reason: str, *names: str, text: bool = False, reads_prompt: bool = False) -> dict[str, Field]:
    return {name: Field(reason, text=text, reads_prompt=reads_prompt) for name in names}


_PROMPT_TEXT: Final = "part of the prompt: the caller's own text, without special tokens"
_SAMPLES: Final = "changes how tokens are sampled from the steered distribution; returns none of its values"
_ENDS: Final = "decides where the answer ends; the answer is steered"
_GENERATED: Final = "returns values of generated positions only, each computed after the policy's edits"
_FORMATS: Final = "changes only how the answer is written out"
_TEMPLATE_OPTION: Final = "changes how the prompt is built from the caller's text; the gates read the result"
_GRAMMAR: Final = (
    "restricts the form of the answer; each token comes from the steered distribution (a prompt gate does "
    "not read text that the form itself forces: docs/threat-model.md)"
)
_GRAMMAR_IN_PROMPT: Final = f"{_GRAMMAR}; some templates also write it into the prompt"
_READS_PROMPT: Final = (
    "returns log-probabilities or ranks at prompt positions, where a gate that opens at the end of the "
    "prompt has edited nothing: refused under a policy that acts differently there than on generated tokens"
)

_SAMPLING = (
    _fields(
        _SAMPLES,
        *("frequency_penalty", "logit_bias", "min_p", "presence_penalty", "repetition_penalty", "seed"),
        *("temperature", "top_k", "top_p"),
    )
    | _fields(_ENDS, "ignore_eos", "stop", "stop_token_ids")
    | _fields(_FORMATS, "include_stop_str_in_output", "skip_special_tokens")
)
_ALWAYS = (
    _fields("separates entries of the prefix cache, in addition to tenant and revision", "cache_salt")
    | _fields("names the model and, by an alias, the policy", "model")
    | _fields("selects how the answer is sent", "stream")
)
_TEMPLATE = _fields(
    _TEMPLATE_OPTION, "add_generation_prompt", "add_special_tokens", "continue_final_message"
) | _fields(_PROMPT_TEXT, "chat_template_kwargs", "tools", text=True)
_COMPLETIONS = (
    _SAMPLING
    | _ALWAYS
    | _fields(_SAMPLES, "allowed_token_ids", "bad_words", "n")
    | _fields(_ENDS, "max_tokens", "min_tokens")
    | _fields(_GENERATED, "logprob_token_ids", "logprobs")
    | _fields(_FORMATS, "return_tokens_as_token_ids", "spaces_between_special_tokens")
    | _fields("token ids of the caller's own prompt and of the steered answer", "return_token_ids")
    | _fields(_TEMPLATE_OPTION, "add_special_tokens", "truncate_prompt_tokens", "truncation_side")
    | _fields(_GRAMMAR, "structured_outputs")
    | _fields("token counts", "stream_options")
)
CHAT: Final[Fields] = (
    _COMPLETIONS
    | _TEMPLATE
    | _fields(_PROMPT_TEXT, "documents", "messages", text=True)
    | _fields(_GRAMMAR_IN_PROMPT, "response_format", "tool_choice", text=True)
    | _fields(_TEMPLATE_OPTION, "reasoning_effort")
    | _fields(_ENDS, "max_completion_tokens", "thinking_token_budget")
    | _fields(_FORMATS, "include_reasoning", "parallel_tool_calls")
    | _fields(_GENERATED, "top_logprobs")
    | _fields(_READS_PROMPT, "prompt_logprobs", reads_prompt=True)
    # The engine then sets prompt_logprobs to top_logprobs, whose default 0 does not turn them off.
    | _fields(f"{_READS_PROMPT} (on this route even without logprobs)", "echo", reads_prompt=True)
)
COMPLETIONS: Final[Fields] = (
    _COMPLETIONS
    | _fields(_GRAMMAR, "response_format")
    | _fields(f"{_PROMPT_TEXT}; ids of special tokens are refused", "prompt", text=True)
    | _fields(_PROMPT_TEXT, "suffix", text=True)
    | _fields(_READS_PROMPT, "prompt_logprobs", reads_prompt=True)
    | _fields(f"repeats the caller's own prompt. With logprobs: {_READS_PROMPT}", "echo", reads_prompt=True)
)
RESPONSES: Final[Fields] = (
    _SAMPLING
    | _ALWAYS
    | _fields(_PROMPT_TEXT, "chat_template_kwargs", "input", "instructions", "tools", text=True)
    | _fields(_GRAMMAR_IN_PROMPT, "text", "tool_choice", text=True)
    | _fields(_GRAMMAR, "structured_outputs")
    | _fields(f"selects parts of the answer; for log-probabilities: {_GENERATED}", "include")
    | _fields(_FORMATS, "include_reasoning", "parallel_tool_calls")
    | _fields(_ENDS, "max_output_tokens", "max_tool_calls")
    | _fields(_TEMPLATE_OPTION, "reasoning", "truncation")
    | _fields(_GENERATED, "top_logprobs")
)
_COUNT = (
    _fields(_PROMPT_TEXT, "chat_template_kwargs", "messages", "system", "tools", text=True)
    | _fields(_GRAMMAR_IN_PROMPT, "tool_choice", text=True)
    | _fields("names the model", "model")
    | _fields(_TEMPLATE_OPTION, "thinking")
)
COUNT: Final[Fields] = _COUNT
MESSAGES: Final[Fields] = (
    _COUNT
    | _ALWAYS
    | _fields(_ENDS, "max_tokens", "stop_sequences")
    | _fields(_GRAMMAR_IN_PROMPT, "output_config", text=True)
    | _fields(_SAMPLES, "temperature", "top_k", "top_p")
)
_NO_MODEL: Final = "no model runs on this route"
TOKENIZE: Final[Fields] = (
    _fields(f"{_NO_MODEL}; {_PROMPT_TEXT}", "chat_template_kwargs", "messages", "prompt", "tools", text=True)
    | _fields(_NO_MODEL, "add_generation_prompt", "add_special_tokens", "continue_final_message", "model")
    | _fields(_NO_MODEL, "return_token_strs")
)
DETOKENIZE: Final[Fields] = _fields(_NO_MODEL, "model", "tokens")
