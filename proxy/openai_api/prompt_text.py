"""Puts the caller's text into the prompt as plain text, never as special tokens, on every route."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from interpretops.special_tokens import JOINER, SpecialTokens
from proxy.errors import FieldNotAllowed, InvalidRequest
from proxy.openai_api.routes import Route

ROLES: Final = frozenset(("assistant", "developer", "function", "ipython", "system", "tool", "user"))
"""Some templates write roles between `<|` and `|>`, so an unknown role could spell a special token."""
_ALONE: Final = frozenset(("prompt", "response_format"))
"""Fields whose strings have no other text next to them: a whole prompt, or a quoted string of a schema."""
_QUOTED: Final = frozenset(("output_config", "text"))
_QUOTED_WITHIN: Final[Mapping[str, frozenset[str]]] = {
    "messages": frozenset(("input", "input_schema", "parameters")),
    "tools": frozenset(("input_schema", "parameters")),
}
"""Schemas and tool arguments, which templates write as JSON. An operator such as `<` in an `enum` must reach
the grammar unchanged."""
_MESSAGE_FIELDS: Final = frozenset(("messages", "input"))


def neutralize_special_tokens(
    route: Route, body: Mapping[str, Any], special: SpecialTokens
) -> dict[str, Any]:
    """A copy of ``body`` with no special token in any text of the prompt.

    Inserts an invisible character where a special token would begin. All other text stays unchanged, byte for
    byte. Refuses the ids of special tokens, and roles that no template knows.
    """
    found = dict(body)
    for name, field in route.fields.items():
        if not field.text or name not in body:
            continue
        if name in _MESSAGE_FIELDS:
            _check_roles(name, body[name])
        if name == "prompt":
            _check_tokens(body[name], special)
        position = _Position(name in _ALONE, name in _QUOTED, _QUOTED_WITHIN.get(name, frozenset()))
        found[name] = _neutralize(body[name], special, position)
    if body.get("continue_final_message") is True:
        _keep_last_text_open(found.get("messages"), body.get("messages"), special)
    return found


def _keep_last_text_open(neutralized: Any, given: Any, special: SpecialTokens) -> None:
    """The answer continues the last message, and no text follows it: leave its end unchanged."""
    if isinstance(given, list) and given and isinstance(given[-1], dict):
        content = given[-1].get("content")
        text = neutralized[-1].get("content")
        if isinstance(content, str) and text.endswith(JOINER) and not content.endswith(JOINER):
            neutralized[-1]["content"] = text.removesuffix(JOINER)


class _Position(NamedTuple):
    """Where a string ends up in the prompt; see `SpecialTokens.neutralize`."""

    alone: bool = False
    quoted: bool = False
    quoted_within: frozenset[str] = frozenset()
    """Keys of objects that templates write as JSON."""


def _neutralize(value: Any, special: SpecialTokens, position: _Position) -> Any:
    if isinstance(value, str):
        return special.neutralize(value, alone=position.alone, quoted=position.quoted)
    if isinstance(value, list):
        return [_neutralize(item, special, position) for item in value]
    if isinstance(value, dict):
        found = {}
        for name, item in value.items():
            if name == "arguments" and isinstance(item, str):
                made: Any = _neutralize_json(item, special)
            elif name in position.quoted_within and isinstance(item, dict):
                made = _neutralize(item, special, position._replace(quoted=True))
            else:
                made = _neutralize(item, special, position)
            found[special.neutralize(name, alone=position.alone, quoted=position.quoted)] = made
        return found
    return value


def _neutralize_json(text: str, special: SpecialTokens) -> str:
    """Neutralize tool arguments, a JSON string. The engine parses it, and templates write the parsed value.

    So an escape (`\\u003c`) could spell a special token that the string itself does not contain. Strings that
    decode to no special token stay unchanged.
    """
    if "\\" in text:
        try:
            decoded = json.loads(text)
            made = _neutralize(decoded, special, _Position(quoted=True))
            if made != decoded:
                text = json.dumps(made, ensure_ascii=False)
        except (ValueError, RecursionError):
            raise InvalidRequest("arguments of a function call must be JSON", param="arguments") from None
    return special.neutralize(text)


def _check_roles(field: str, given: Any) -> None:
    for index, message in enumerate(given if isinstance(given, list) else ()):
        role = message.get("role") if isinstance(message, dict) else None
        if role is not None and not (isinstance(role, str) and role in ROLES):
            where = f"{field}[{index}].role"
            raise InvalidRequest(
                f"{where} = {str(role)[:32]!r}, but must be one of {', '.join(sorted(ROLES))}", param=where
            )


def _check_tokens(prompt: Any, special: SpecialTokens) -> None:
    """A prompt is a string, a list of strings, a list of token ids, or a list of such lists; never a mix."""
    if isinstance(prompt, str) or (
        isinstance(prompt, list) and all(isinstance(item, str) for item in prompt)
    ):
        return
    if isinstance(prompt, list) and all(isinstance(item, list) for item in prompt):
        for index, tokens in enumerate(prompt):
            _check_list(f"prompt[{index}]", tokens, special)
    elif isinstance(prompt, list):
        _check_list("prompt", prompt, special)
    else:
        raise InvalidRequest("prompt must be a string, or a list of strings or token ids", param="prompt")


def _check_list(where: str, tokens: list[Any], special: SpecialTokens) -> None:
    # The engine would take "0", 0.0 and false for token 0 as well.
    if any(type(item) is not int for item in tokens):
        raise InvalidRequest(f"{where} holds something that is not a token id", param=where)
    if (match := special.in_tokens(tokens)) is not None:
        place, text = match
        raise FieldNotAllowed(
            f"{where}[{place}] = {tokens[place]} is the special token {text!r}, which only the engine may "
            "put into a prompt; remove it",
            param=f"{where}[{place}]",
        )
