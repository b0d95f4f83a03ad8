"""Which chat template variables a caller may set: all but those that control how the prompt is built."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from proxy.errors import FieldNotAllowed, InvalidRequest

FIELD: Final = "chat_template_kwargs"
RESERVED: Final = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "model_config",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "tokenize",
        "tokenizer",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)
"""Arguments of the function that renders the template and may tokenize the result.

vLLM passes a request's variables to that function by name: `padding` would append special tokens to the
prompt, and `tools` would replace the checked ones.
"""


def check_template_kwargs(body: Mapping[str, Any]) -> None:
    """Refuse a variable that is an argument of the renderer, or a special token of the tokenizer."""
    given = body.get(FIELD)
    if given is None:
        return
    if not isinstance(given, dict):
        raise InvalidRequest(f"{FIELD} must be an object", param=FIELD)
    for name in given:
        if name in RESERVED or name.endswith(("_token", "_special_tokens")):
            raise FieldNotAllowed(
                f"{FIELD}.{name[:64]} is not a template variable but controls how the prompt is built; "
                "remove it (some are fields of the request itself)",
                param=f"{FIELD}.{name[:64]}",
            )
