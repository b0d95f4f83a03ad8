"""Which tokens to suppress so that unwanted words are not completed.

A word of several tokens ("f", "uck") is suppressed at one of them, once those before it have been generated:
at the one that the discovery prompts use least elsewhere.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.gates.contrast import Contrast, Judged
from discovery.proposals.judging import shows

_WORD = re.compile(r"[^\W\d_][\w*'-]*")

LEADS = (" ", "-", '"', "“")
"""What comes before a word."""

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class SuppressedToken:
    """A token that completes an unwanted word, or makes it certain, after certain beginnings."""

    token: int
    after: tuple[Tokens, ...]
    """Beginnings of words; ``()`` where the token is a word by itself."""


def unwanted_words(contrast: Contrast, texts: Iterable[str]) -> list[str]:
    """The class's own words, then words in ``texts`` that its judge marks, the most frequent first."""
    if wrong := [word for word in contrast.words if not shows(contrast.judge, word)]:
        raise DiscoveryError(
            f"words: the class {contrast.name} names {wrong[0]!r}, which its judge does not mark; remove it"
        )
    found = Counter(word.lower() for text in texts for word in _WORD.findall(text))
    marked = [word for word, _ in found.most_common() if shows(contrast.judge, word)]
    return list(dict.fromkeys([*contrast.judge.words, *contrast.words, *marked]))


def spellings(model: FrozenModel, judge: Judged, words: Sequence[str]) -> list[Tokens]:
    """Every word as tokens, as given and capitalised, after each of `LEADS`, without duplicates.

    Without a lead a spelling would match too much: "ass" also begins "assert", a line of code.
    """
    found: dict[Tokens, None] = {}
    for word in words:
        for spelled in (word, word[:1].upper() + word[1:]):
            if shows(judge, spelled):
                found |= dict.fromkeys(tuple(model.text_ids(lead + spelled)) for lead in LEADS)
    if not found:
        raise DiscoveryError(
            "the class names no words and its prompts contain none; add `words` to the class file"
        )
    return [tokens for tokens in found if tokens]


def suppressed_tokens(spelled: Iterable[Tokens], used: Mapping[int, int]) -> list[SuppressedToken]:
    """The tokens that suppress all words; ``used`` counts each token in the discovery prompts.

    A word that contains a suppressed one needs no token of its own.
    """
    found: dict[int, list[Tokens]] = {}
    for tokens in sorted(spelled, key=lambda tokens: (len(tokens), tokens)):
        if any(
            tokens[:at][len(tokens[:at]) - len(before) :] == before
            for at in range(len(tokens))
            for before in found.get(tokens[at], ())
            if len(before) <= at
        ):
            continue
        places = range(1, len(tokens)) if len(tokens) > 1 else range(1)
        at = min(places, key=lambda place: (used.get(tokens[place], 0), -tokens[place]))
        found.setdefault(tokens[at], []).append(tokens[:at])
    return [SuppressedToken(token, tuple(after)) for token, after in found.items()]
