"""The tokenizer's special tokens, for the gateway, and a test that it can keep them out of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from interpretops.engine_api import SpecialTokenList
from interpretops.special_tokens import JOINER, SpecialTokens


def describe_special_tokens(tokenizer: Any) -> SpecialTokenList:
    """``ids``: text to id; ``first``: token that starts every prompt; ``fault``: why the tokenizer is unsafe.

    Tokenizes the text of every special token, neutralized as the gateway does it. If a special token still
    results, that is a fault. So is a look-alike that the tokenizer's normalizer turns into a special token.
    """
    if tokenizer is None:
        return SpecialTokenList(ids={}, fault="the engine has no tokenizer (--skip-tokenizer-init)")
    ids = _special_ids(tokenizer)
    before = list(tokenizer.encode("", add_special_tokens=True))
    first = before[0] if before and before[0] in ids.values() else None
    return SpecialTokenList(ids=ids, first=first, fault=_fault(tokenizer, SpecialTokens(ids, first)))


def _special_ids(tokenizer: Any) -> dict[str, int]:
    """Added tokens marked special, and the tokens in `all_special_tokens`."""
    found = {
        str(token): int(index)
        for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if getattr(token, "special", True)
    }
    named = [str(token) for token in tokenizer.all_special_tokens]
    found |= {token: int(tokenizer.convert_tokens_to_ids(token)) for token in named if token not in found}
    return {text: index for text, index in found.items() if text}


def _fault(tokenizer: Any, special: SpecialTokens) -> str | None:
    def encode(text: str) -> set[int]:
        return set(tokenizer.encode(text, add_special_tokens=False))

    # If the vocabulary lacks the joiner, it maps to the unknown token, as any rare character does.
    unsafe = set(special.ids.values()) - encode(JOINER) - encode(f"a{JOINER}a")
    for text in special.ids:
        for written in (text, f"a{text}", f" {text} ", text + text):
            if encode(special.neutralize(written)) & unsafe:
                return f"{text!r} is still a special token with {JOINER!r} after its first character"
        for alike in _look_alikes(text):
            if encode(special.neutralize(alike)) & unsafe:
                return f"{alike!r} becomes the special token {text!r} through the tokenizer's normalizer"
    return None


def _look_alikes(text: str) -> Iterator[str]:
    """Spellings that normalizers are known to fold: full-width forms, upper and lower case."""
    yield "".join(chr(ord(char) + 0xFEE0) if "!" <= char <= "~" else char for char in text)
    yield text.upper()
    yield text.lower()
