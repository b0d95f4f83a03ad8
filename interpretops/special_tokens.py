"""Stops the tokenizer from reading user text as special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final

JOINER: Final = "\u2060"
"""WORD JOINER: invisible, and without effect except on line breaks."""


class SpecialTokens:
    """The special tokens of one tokenizer, and a way to neutralise them in text.

    A tokenizer first looks for the texts of its special tokens, and a chat template puts user text between
    special tokens. So user text must not contain a special token, nor form one together with its neighbours.
    """

    def __init__(self, ids: Mapping[str, int], first: int | None = None) -> None:
        """``ids``: text to id. ``first``: the id that the tokenizer puts before every prompt, if any."""
        self.ids = {text: token for text, token in ids.items() if text}
        self.first = first
        self._text_of = {token: text for text, token in self.ids.items()}
        # Match only the first character, so that a token that begins inside another is found too.
        heads = sorted({text[0] for text in self.ids})
        rests = [_any_of(text[1:] for text in self.ids if text[0] == head) for head in heads]
        pairs = zip(heads, rests, strict=True)
        begins = "|".join(f"{re.escape(head)}(?={rest})" for head, rest in pairs)
        self._begins = re.compile(begins) if begins else None
        starts = {text[:size] for text in self.ids for size in range(1, len(text))}
        self._starts = _by_length(starts)
        # What remains of a token if the template writes the brackets. Plain words are left alone: a tool
        # may have a parameter named `filename`.
        bracketed = [text for text in self.ids if not re.fullmatch(r"\w*", text[1:-1])]
        self._inner = {text[1:-1] for text in bracketed}
        self._rests = tuple(text[1:] for text in bracketed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpecialTokens) and (self.ids, self.first) == (other.ids, other.first)

    def __hash__(self) -> int:
        return hash((frozenset(self.ids.items()), self.first))

    def neutralize(self, text: str, *, alone: bool = False, quoted: bool = False) -> str:
        """Insert a `JOINER` wherever a special token would begin, and where a neighbour could complete one.

        alone   the text will have no neighbours, so only its own content matters
        quoted  the text will be inside JSON or brackets, not directly next to other text

        Other text is returned unchanged. A template may trim the text, so the check is made on the trimmed
        text, and the `JOINER` goes to its outer end, where trimming stops.
        """
        if self._begins is None:
            return text
        found = self._begins.sub(rf"\g<0>{JOINER}", text)
        if alone:
            return found
        core = text.strip()
        if core in self._inner or (not quoted and text.lstrip().startswith(self._rests)):
            if text[:1] == core[:1]:
                found = text[0] + JOINER + found[1:].removeprefix(JOINER)
            else:
                found = JOINER + found
        if quoted:
            return found
        end = found.rstrip()
        if any(end[-size:] in starts for size, starts in self._starts.items()):
            found += JOINER
        return found

    def in_tokens(self, tokens: Iterable[int]) -> tuple[int, str] | None:
        """Position and text of the first special token in ``tokens`` that the tokenizer did not add."""
        for place, token in enumerate(tokens):
            if token in self._text_of and not (place == 0 and token == self.first):
                return place, self._text_of[token]
        return None


def _by_length(texts: Iterable[str]) -> dict[int, frozenset[str]]:
    found: dict[int, set[str]] = {}
    for text in texts:
        if text:
            found.setdefault(len(text), set()).add(text)
    return {size: frozenset(members) for size, members in found.items()}


def _any_of(texts: Iterable[str]) -> str:
    """A pattern for all texts, as a tree: some tokenizers have thousands with the same beginning."""
    branches: dict[str, set[str]] = {}
    found = set(texts)
    if "" in found:
        return ""
    for text in found:
        branches.setdefault(text[0], set()).add(text[1:])
    parts = []
    for head, rests in branches.items():
        while "" not in rests and len({rest[0] for rest in rests}) == 1:
            head += next(iter(rests))[0]  # noqa: PLW2901
            rests = {rest[1:] for rest in rests}  # noqa: PLW2901
        parts.append(re.escape(head) + ("" if "" in rests else _any_of(rests)))
    return f"(?:{'|'.join(parts)})"
