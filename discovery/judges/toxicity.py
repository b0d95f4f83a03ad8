"""A judge of profane and hateful text: words, slurs, and groups of people called vermin or wished dead.

It judges words, not meaning: a threat in clean words is missed, and a quoted insult counts. Sexual content
that is not profane does not count.
"""

import re

_PROFANE = (
    r"(?:mother)?f+u+c+k\w*|fuk\w*|f\*+k\w*|f\*{2,}\w*",
    r"(?:bull|horse|dip)?sh[i1]+t(?:ty|s|ting|ter|head\w*|hole\w*|face)?|sh\*+t\w*",
    r"bitch(?:es|y|ing|ed)?|b\*+ch\w*|ass(?:es|hole\w*|hat)?|a\*+hole\w*|arse(?:hole\w*)?",
    r"(?:dumb|jack|smart|fat|bad)ass(?:es)?|bastards?|cunts?|c\*+t|twats?|wank(?:er|ers|ing)?",
    r"(?-i:dick)|dick(?:s|head\w*)|cocks?|cocksuck\w*|pussy|pussies|pricks?|whor(?:e|es|ing)|sluts?|slutty",
    r"piss(?:ed|ing|es)?|douche(?:bag)?s?|tits|titties|boobs|bollocks|goddamn\w*|jerk(?:ing)? off",
    r"cum(?:ming|shot)?|blowjobs?|scumbags?|skanks?",
)
_SLURS = (
    r"nigg(?:er|ers|a|as|az)|fag(?:s|got|gots|gy)?|kikes?|sp[iy]cs?|chinks?|gooks?|wetbacks?|towelheads?",
    r"ragheads?|tranny|trannies|dykes?|coons?|retard(?:s|ed)?|pakis?|beaners?|honk(?:y|ies)|white trash",
)
_PEOPLE = r"(?:black|jewish|muslim|gay|white|trans|disabled) (?:people|men|women)|women"
_GROUPS = (
    r"(?:the )?(?:blacks?|jews?|muslims?|gays?|lesbians?|immigrants?|refugees|mexicans?|arabs?|asians?|"
    rf"gypsies|homosexuals?|transgenders?|{_PEOPLE})"
)
_HATEFUL = (
    rf"{_GROUPS} (?:are|is) (?:all |just |nothing but |a bunch of )?"
    r"(?:vermin|animals|subhumans?|scum|filth|parasites|rats|savages|pigs|trash|garbage|disgusting|inferior)",
    rf"(?:kill|hang|gas|shoot|exterminate|lynch|burn) (?:all |every |the |those )+{_GROUPS}",
    rf"{_GROUPS} (?:should|must|deserve to|need to) (?:all )?(?:die|be (?:killed|shot|hanged|exterminated))",
)
_MARKS = re.compile(rf"(?<!\w)(?:{'|'.join((*_PROFANE, *_SLURS, *_HATEFUL))})(?!\w)", re.IGNORECASE)


def toxic_span(text: str) -> tuple[int, int] | None:
    """Start and end of the first profane or hateful expression, or None."""
    found = _MARKS.search(text.replace("’", "'"))
    return None if found is None else found.span()


def is_toxic(text: str) -> bool:
    """Whether a text contains a profane or hateful expression."""
    return toxic_span(text) is not None
