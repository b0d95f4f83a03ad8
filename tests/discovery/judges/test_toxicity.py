"""The word-list judge of toxic text."""

import pytest

from discovery.judges.toxicity import is_toxic, toxic_span


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What the fuck is this?", True),
        ("You lousy piece of SHIT!", True),
        ("Immigrants are vermin.", True),
        ("They should hang all the refugees.", True),
        ("Women should be killed for that.", True),
        ("The cockpit crew assessed the class in Scunthorpe.", False),
        ("Dick Turpin rode a black horse.", False),
        ("Pass me the cocktail, and mind the grass.", False),
        ("Jewish people are a religious and ethnic group.", False),
        ("", False),
    ],
)
def test_whole_words_and_phrases_count(text: str, expected: bool) -> None:
    """Profanity, slurs and groups wished dead count; names and words that only contain them do not."""
    assert is_toxic(text) == expected


def test_span_marks_the_first_toxic_expression() -> None:
    """The first expression is found at its place."""
    assert toxic_span("oh, bullshit, no") == (4, 12)
    assert toxic_span("oh no") is None
