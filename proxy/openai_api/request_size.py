"""How many answers a request asks for, and how many tokens it may use; refuses what is over the bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from interpretops.settings import GatewaySettings
from proxy.errors import InvalidRequest

_UNSTATED_TOKENS: Final = 256
"""What an answer is taken to hold when the request does not say: a guess, put right when it ends."""
_BYTES_PER_TOKEN: Final = 4
_LENGTHS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@dataclass(frozen=True)
class Size:
    """What one request asks for. A request of several prompts is as many for the engine."""

    prompts: int = 1
    choices: int = 1
    """Answers to each prompt."""
    read: int = 0
    """Tokens of all prompts together: numbers are counted, texts taken at four bytes a token."""
    stated: int | None = None
    """Most tokens of each answer, where the request says so."""

    @property
    def requests(self) -> int:
        """Answers, each of which is a request of its own for the engine."""
        return self.prompts * self.choices

    @property
    def tokens(self) -> int:
        """What it may use. Each answer counts its prompt, as the engine's receipts do."""
        written = _UNSTATED_TOKENS if self.stated is None else self.stated
        return self.choices * self.read + self.requests * written

    @property
    def owed(self) -> int:
        """What must be left of a budget: all it may use, but for the guess at a single answer's length."""
        return self.read if self.stated is None and self.requests == 1 else self.tokens


def size_of(body: Mapping[str, Any], size_bytes: int) -> Size:
    """The size of a cleaned body of any route. Raises `InvalidRequest` where no number can be told."""
    choices = _whole(body, "n", 1)
    if choices < 1:
        raise InvalidRequest(f"n = {choices}, but must be at least 1", param="n")
    prompts, tokens = _prompts(body.get("prompt"))
    stated = [length for length in (_whole(body, name, 0) for name in _LENGTHS) if length > 0]
    read = max(size_bytes // _BYTES_PER_TOKEN, tokens)
    return Size(prompts, choices, read, max(stated, default=None))


def check_size(size: Size, bounds: GatewaySettings) -> None:
    """Refuse more answers than one request may ask for, whoever asks."""
    if size.choices > bounds.max_choices:
        raise InvalidRequest(
            f"n = {size.choices}, but at most {bounds.max_choices} answers to a prompt are served "
            "(gateway.max_choices); ask for fewer",
            param="n",
        )
    if size.requests > bounds.max_answers:
        asked = f"{size.prompts} prompts" + (f" times n = {size.choices}" if size.choices > 1 else "")
        raise InvalidRequest(
            f"prompt: {asked} are {size.requests} answers, but at most {bounds.max_answers} are served in "
            "one request (gateway.max_answers); send several",
            param="prompt" if size.prompts > 1 else "n",
        )


def _prompts(prompt: Any) -> tuple[int, int]:
    """How many prompts, and how many tokens are given as numbers. One list of numbers is one prompt."""
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
        "prompt must be a text, a list of texts, a list of token numbers or a list of such lists, none empty",
        param="prompt",
    )


def _is_token(value: Any) -> bool:
    return type(value) is int


def _whole(body: Mapping[str, Any], name: str, default: int) -> int:
    """A whole number, as JSON writes it; the engine itself would also take `"7"` and `true` for one."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number", param=name)
    return value
