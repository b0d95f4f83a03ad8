"""What a caller wrote goes into the prompt as text: never as special tokens, on any route."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from interpretops.special_tokens import JOINER, SpecialTokens
from proxy.errors import FieldNotAllowed, InvalidRequest
from proxy.openai_api.routes import Route

ROLES: Final = frozenset(("assistant", "developer", "function", "ipython", "system", "tool", "user"))
"""Templates write `<|` and `|>` around some of them, so that any other could spell a special token."""
_ALONE: Final = frozenset(("prompt", "response_format"))
"""Nothing stands beside a whole prompt, and quotation marks around what is in a schema."""
_QUOTED: Final = frozenset(("output_config", "text"))
_QUOTED_WITHIN: Final[Mapping[str, frozenset[str]]] = {
    "messages": frozenset(("input", "input_schema", "parameters")),
    "tools": frozenset(("input_schema", "parameters")),
}
"""Schemas and what functions are called with: templates write them as JSON. An operator such as `<` in an
`enum` must reach the grammar as it is."""
_SPOKEN: Final = frozenset(("messages", "input"))


def make_inert(route: Route, body: Mapping[str, Any], special: SpecialTokens) -> dict[str, Any]:
    """``body`` with no special token in anything that becomes part of the prompt.

    Texts get an invisible character where one would begin; other texts stay as they are, byte for byte. Token
    numbers are refused by place and name, and so are roles that no template knows.
    """
    found = dict(body)
    for name, field in route.fields.items():
        if not field.text or name not in body:
            continue
        if name in _SPOKEN:
            _check_roles(name, body[name])
        if name == "prompt":
            _check_tokens(body[name], special)
        how = _How(name in _ALONE, name in _QUOTED, _QUOTED_WITHIN.get(name, frozenset()))
        found[name] = _inert(body[name], special, how)
    if body.get("continue_final_message") is True:
        _leave_open(found.get("messages"), body.get("messages"), special)
    return found


def _leave_open(made: Any, given: Any, special: SpecialTokens) -> None:
    """Nothing will stand behind the last text, which the answer goes on with: its end stays as it is."""
    if isinstance(given, list) and given and isinstance(given[-1], dict):
        content = given[-1].get("content")
        inert = made[-1].get("content")
        if isinstance(content, str) and inert.endswith(JOINER) and not content.endswith(JOINER):
            made[-1]["content"] = inert.removesuffix(JOINER)


class _How(NamedTuple):
    """Where a text will stand in the prompt: see `SpecialTokens.inert`."""

    alone: bool = False
    quoted: bool = False
    quoted_within: frozenset[str] = frozenset()
    """Names of objects that are written as JSON."""


def _inert(value: Any, special: SpecialTokens, how: _How) -> Any:
    if isinstance(value, str):
        return special.inert(value, alone=how.alone, quoted=how.quoted)
    if isinstance(value, list):
        return [_inert(item, special, how) for item in value]
    if isinstance(value, dict):
        found = {}
        for name, item in value.items():
            if name == "arguments" and isinstance(item, str):
                made: Any = _inert_json(item, special)
            elif name in how.quoted_within and isinstance(item, dict):
                made = _inert(item, special, how._replace(quoted=True))
            else:
                made = _inert(item, special, how)
            found[special.inert(name, alone=how.alone, quoted=how.quoted)] = made
        return found
    return value


def _inert_json(text: str, special: SpecialTokens) -> str:
    """What a function was called with, a JSON text. The engine reads it, and templates write what it means.

    So an escape (`\\u003c`) could spell what the text itself does not. Texts that mean no special token stay
    as they are.
    """
    if "\\" in text:
        try:
            meant = json.loads(text)
            made = _inert(meant, special, _How(quoted=True))
            if made != meant:
                text = json.dumps(made, ensure_ascii=False)
        except (ValueError, RecursionError):
            raise InvalidRequest("arguments of a function call must be JSON", param="arguments") from None
    return special.inert(text)


def _check_roles(field: str, given: Any) -> None:
    for index, message in enumerate(given if isinstance(given, list) else ()):
        role = message.get("role") if isinstance(message, dict) else None
        if role is not None and not (isinstance(role, str) and role in ROLES):
            where = f"{field}[{index}].role"
            raise InvalidRequest(
                f"{where} = {str(role)[:32]!r}, but must be one of {', '.join(sorted(ROLES))}", param=where
            )


def _check_tokens(prompt: Any, special: SpecialTokens) -> None:
    """A prompt is a text, several, a list of token numbers, or several of those; nothing between them."""
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
        raise InvalidRequest("prompt must be a text, or a list of texts or token numbers", param="prompt")


def _check_list(where: str, tokens: list[Any], special: SpecialTokens) -> None:
    # The engine would take "0", 0.0 and false for token 0 as well.
    if any(type(item) is not int for item in tokens):
        raise InvalidRequest(f"{where} holds something that is not a token number", param=where)
    if (met := special.in_tokens(tokens)) is not None:
        place, text = met
        raise FieldNotAllowed(
            f"{where}[{place}] = {tokens[place]} is the special token {text!r}, which only the engine may "
            "put into a prompt; leave it out",
            param=f"{where}[{place}]",
        )
