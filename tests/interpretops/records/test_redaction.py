"""Personal data is found by form, check digit and libphonenumber; what only looks like it stays."""

import pytest

from interpretops.errors import ConfigError
from interpretops.records.redaction import Redactor


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(("US", "DE"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to john.smith+x@mail.example.co.uk, please", "write to [EMAIL], please"),
        ("müller@exämple.de schrieb", "[EMAIL] schrieb"),
        ("call 212-555-1234 or +44 20 7946 0958 now", "call [PHONE] or [PHONE] now"),
        ("unter 030 901820 erreichbar", "unter [PHONE] erreichbar"),
        ("IBAN DE89 3704 0044 0532 0130 00 AND more", "IBAN [IBAN] AND more"),
        ("GB82WEST12345698765432.", "[IBAN]."),
        ("card 4111 1111 1111 1111, 4111-1111-1111-1111", "card [CARD], [CARD]"),
        ("SSN 536-90-4399", "SSN [SSN]"),
        ("from 192.168.1.7, 2001:db8::1.", "from [IP], [IP]."),
        ("key sk-abc123def456ghi789jkl012", "key [SECRET]"),
        ("AKIAIOSFODNN7EXAMPLE", "[SECRET]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----!", "[SECRET]!"),
    ],
)
def test_what_names_a_person_or_opens_a_door_is_replaced(
    redactor: Redactor, text: str, expected: str
) -> None:
    """Each kind becomes its name in brackets, and the text around it stays."""
    assert redactor.text(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "In 2024-01-01 at 10:20:30 we had 12345 visitors, 3.5 % of them new.",
        "def f(x): return a::b(x[17]) if x @ y else 1234",
        "DE00 3704 0044 0532 0130 00 is no account, 4111 1111 1111 1112 no card",
        "Adam said: be kind @ home",
    ],
)
def test_what_only_looks_like_it_stays(redactor: Redactor, text: str) -> None:
    """Dates, code, and numbers whose check digits are wrong are left alone."""
    assert redactor.text(text) == text


def test_every_text_of_a_value_is_looked_at(redactor: Redactor) -> None:
    """Nested lists, objects and their keys; numbers and words that are no text stay what they are."""
    value = {"a@b.example": [{"content": "x a@b.example"}, 3, None, True]}
    assert redactor.value(value) == {"[EMAIL]": [{"content": "x [EMAIL]"}, 3, None, True]}


def test_whole_numbers_are_looked_at_as_texts_are(redactor: Redactor) -> None:
    """As where a tool's arguments are an object: a card's digits need no quotes."""
    value = {"card": 4111111111111111, "phone": 2125551234, "no card": 4111111111111112, "n": 12345678}
    assert redactor.value(value) == {**value, "card": "[CARD]", "phone": "[PHONE]"}


def test_names_of_people_are_not_found(redactor: Redactor) -> None:
    """A limit that the documentation states: no model of language reads the text."""
    assert redactor.text("John Smith lives here.") == "John Smith lives here."


def test_long_texts_of_any_kind_take_no_time_without_bound(redactor: Redactor) -> None:
    """Repetitions that would lead a careless pattern astray end soon."""
    for part in ("a@", "1", "DE89 ", "a.b", "1 2 ", "-----BEGIN PRIVATE KEY-----"):
        redactor.text(part * 100)


def test_unknown_country_is_named() -> None:
    """A region that libphonenumber does not have stops the start."""
    with pytest.raises(ConfigError, match="phone_regions: 'XX'"):
        Redactor(("XX",))
