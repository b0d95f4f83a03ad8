"""How many answers and tokens a request may need. Refuses requests over the limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from interpretops.settings import GatewaySettings
from proxy.errors import InvalidRequest

_DEFAULT_ANSWER_TOKENS: Final = 256
"""Estimated length of an answer when the request sets none. Corrected when the request ends."""
_BYTES_PER_TOKEN: Final = 4
_LENGTH_FIELDS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@dataclass(frozen=True)
class Size:
    """What one request asks for. Each of its prompts is a request of its own to the engine."""

    prompts: int = 1
    choices: int = 1
    """Answers per prompt."""
    read: int = 0
    """Tokens of all prompts together. Token ids are counted; text is estimated at four bytes a token."""
    stated: int | None = None
    """Most tokens of each answer, if the request sets it."""

    @property
    def requests(self) -> int:
        """Number of answers. Each is a request of its own to the engine."""
        return self.prompts * self.choices

    @property
    def tokens(self) -> int:
        """Most tokens it may use. Each answer counts its prompt again, as the engine's receipts do."""
        written = _DEFAULT_ANSWER_TOKENS if self.stated is None else self.stated
        return self.choices * self.read + self.requests * written

    @property
    def budget_tokens(self) -> int:
        """Tokens that must be left in the budget. Excludes the estimated length of a single answer."""
        return self.read if self.stated is None and self.requests == 1 else self.tokens


def size_of(body: Mapping[str, Any], size_bytes: int) -> Size:
    """The size of a cleaned body of any route. Raises `InvalidRequest` for a count that is not valid."""
    choices = _whole(body, "n", 1)
    if choices < 1:
        raise InvalidRequest(f"n = {choices}, but must be at least 1", param="n")
    prompts, tokens = _prompts(body.get("prompt"))
    stated = [length for length in (_whole(body, name, 0) for name in _LENGTH_FIELDS) if length > 0]
    read = max(size_bytes // _BYTES_PER_TOKEN, tokens)
    return Size(prompts, choices, read, max(stated, default=None))


def check_size(size: Size, bounds: GatewaySettings) -> None:
    """Refuse more answers than one request of any tenant may ask for."""
    if size.choices > bounds.max_choices:
        raise InvalidRequest(
            f"n = {size.choices}, but at most {bounds.max_choices} answers per prompt are allowed "
            "(gateway.max_choices); ask for fewer",
            param="n",
        )
    if size.requests > bounds.max_answers:
        asked = f"{size.prompts} prompts" + (f" times n = {size.choices}" if size.choices > 1 else "")
        raise InvalidRequest(
            f"prompt: {asked} are {size.requests} answers, but at most {bounds.max_answers} are allowed in "
            "one request (gateway.max_answers); split it into several",
            param="prompt" if size.prompts > 1 else "n",
        )


def _prompts(prompt: Any) -> tuple[int, int]:
    """The number of prompts, and of tokens given as ids. One list of ids is one prompt."""
    if prompt is None or isinstance(prompt, str):
        return 1, 0
    if isinstance(prompt, list) and prompt:
        if all(map(_is_token, prompt)):
            return 1, len(prompt)
        if all(isinstance(part, str) for part in prompt):
            return len(prompt), 0
        if all(isinstance(part, list) and part and all(map(_is_token, part)) for part in prompt):
            return len(prompt), sum(map(len, prompt))
    raise InvalidRequest(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists, none empty",
        param="prompt",
    )


def _is_token(value: Any) -> bool:
    return type(value) is int


def _whole(body: Mapping[str, Any], name: str, default: int) -> int:
    """A JSON integer. The engine itself would also accept `"7"` and `true`."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number", param=name)
    return value
