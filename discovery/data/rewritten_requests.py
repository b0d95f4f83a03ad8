"""Rewrites requests as careless or evasive users write them: misspelt, reordered, half foreign, shortened.

The meaning stays. Both sides are rewritten in the same way, so a gate cannot rely on odd writing.
"""

import random
from collections.abc import Callable

Rewriting = Callable[[list[str], random.Random], list[str]]

_LITTLE = "a an the to of for in on at is are do does i me my you your can could please and that"
_FOREIGN = {
    "a": ("un", "ein", "une", "um"),
    "and": ("y", "und", "et", "e", "и"),
    "can": ("puedo", "kann", "peux"),
    "explain": ("explica", "erkläre", "explique", "spiega"),
    "for": ("para", "für", "pour", "per"),
    "from": ("de", "von", "da"),
    "give": ("dame", "gib", "donne"),
    "how": ("cómo", "wie", "comment", "come", "как"),
    "in": ("en", "dans", "em", "в"),
    "make": ("hacer", "machen", "faire", "fare", "сделать"),
    "my": ("mi", "mein", "mon", "мой"),
    "of": ("de", "von", "di"),
    "people": ("gente", "Leute", "personnes", "люди", "人"),
    "someone": ("alguien", "jemand", "quelqu'un", "qualcuno"),
    "the": ("el", "das", "le", "o", "il"),
    "to": ("a", "zu", "à", "para"),
    "use": ("usar", "benutzen", "utiliser"),
    "what": ("qué", "was", "quoi", "что"),
    "with": ("con", "mit", "avec", "com", "с"),
    "without": ("sin", "ohne", "sans", "senza", "без"),
    "write": ("escribe", "schreib", "écris", "scrivi", "写"),
    "you": ("tú", "du", "vous", "ты"),
}
_FILLERS = ("pues", "also", "donc", "allora", "так", "quasi", "ja", "well", "呢", "sí", "bitte", "voilà")


def rewritten(text: str, chance: random.Random) -> str:
    """The text after one to three random rewrites."""
    words = text.split(" ")
    for rewriting in chance.sample(REWRITINGS, chance.randint(1, 3)):
        words = rewriting(words, chance)
    return " ".join(words)


def _misspelt(words: list[str], chance: random.Random) -> list[str]:
    """Delete, double, swap or star a letter in half of the longer words."""
    return [_slip(word, chance) if len(word) > 3 and chance.random() < 0.5 else word for word in words]


def _slip(word: str, chance: random.Random) -> str:
    at = chance.randrange(1, len(word) - 1)
    return chance.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + "*" + word[at + 1 :],
        )
    )


def _reordered(words: list[str], chance: random.Random) -> list[str]:
    """Move the end to the front, or swap one in four words with its neighbour."""
    words = list(words)
    if len(words) < 3:
        return words
    if chance.random() < 0.5:
        at = chance.randrange(1, len(words))
        return words[at:] + words[:at]
    for _ in range(max(1, len(words) // 4)):
        at = chance.randrange(len(words) - 1)
        words[at : at + 2] = words[at + 1], words[at]
    return words


def _half_foreign(words: list[str], chance: random.Random) -> list[str]:
    """Translate common words into other languages, and add one or two fillers."""
    found = []
    for word in words:
        others = _FOREIGN.get(word.lower())
        found.append(chance.choice(others) if others and chance.random() < 0.6 else word)
        if chance.random() < 0.06:
            found.append(chance.choice(_FILLERS))
    return found


def _shortened(words: list[str], chance: random.Random) -> list[str]:
    """Drop most function words."""
    return [word for word in words if word.lower() not in _LITTLE.split() or chance.random() < 0.3] or list(
        words
    )


REWRITINGS: tuple[Rewriting, ...] = (_misspelt, _reordered, _half_foreign, _shortened)
