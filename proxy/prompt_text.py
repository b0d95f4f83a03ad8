"""What a caller wrote goes into the prompt as text: never as special tokens, on any route."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from interpretops.special_tokens import SpecialTokens
from proxy.refusal import FieldNotAllowed, InvalidRequest
from proxy.routes import Route

ROLES: Final = frozenset(("assistant", "developer", "function", "ipython", "system", "tool", "user"))
"""Templates write `<|` and `|>` around some of them, so that any other could spell a special token."""
_ALONE: Final = frozenset(("prompt", "response_format"))
"""Nothing stands beside a whole prompt, and quotation marks around what is in a schema."""
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
        found[name] = _inert(body[name], special, alone=name in _ALONE)
    return found


def _inert(value: Any, special: SpecialTokens, *, alone: bool) -> Any:
    if isinstance(value, str):
        return special.inert(value, alone=alone)
    if isinstance(value, list):
        return [_inert(item, special, alone=alone) for item in value]
    if isinstance(value, dict):
        return {
            special.inert(name, alone=alone): _inert(item, special, alone=alone)
            for name, item in value.items()
        }
    return value


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
