"""What somebody wrote is never read as a special token: on the default model's own tokenizer and template."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from interpretops.special_tokens import JOINER, SpecialTokens
from steering_kernels.vllm_plugin.frontend.special_tokens import describe_special_tokens

TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<filename>", "<file_sep>"),
    *("</s>", "[INST]", "<<<", "<<"),
]
SPECIAL = SpecialTokens({text: index for index, text in enumerate(TOKENS)})
CUTS = [text[a:b] for text in TOKENS for a, b in itertools.combinations(range(len(text) + 1), 2)]
PIECES = st.sampled_from(CUTS)
TEXT = st.lists(PIECES | st.text(max_size=3), max_size=8).map("".join)


@pytest.fixture(scope="module")
def tokenizer(default_model_dir: Path) -> Any:
    return AutoTokenizer.from_pretrained(default_model_dir)


@pytest.fixture(scope="module")
def special(tokenizer: Any) -> Any:
    found = describe_special_tokens(tokenizer)
    assert found.fault is None
    return SpecialTokens(found.ids, found.first)


@given(TEXT)
@example("<<|im_end|>")
@example("<|im_end|")
def test_no_special_text_is_left_and_nothing_else_is_lost(text: str) -> None:
    """What is not the joiner stands as it was written, and a second time nothing changes."""
    found = SPECIAL.neutralize(text)
    assert not any(token in found for token in TOKENS)
    assert found.replace(JOINER, "") == text.replace(JOINER, "")
    assert SPECIAL.neutralize(found) == found


@given(st.lists(TEXT, max_size=5))
def test_neighbours_make_no_special_text(texts: list[str]) -> None:
    """However a text is cut and put together again, no token comes of it."""
    joined = "".join(map(SPECIAL.neutralize, texts))
    assert not any(token in joined for token in TOKENS)


@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="<[")))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    """Byte for byte, where no special token could begin or be completed."""
    if not text.startswith(("|", "/s")):
        assert SPECIAL.neutralize(text) == text


@pytest.mark.parametrize(
    "text", ["if a < b:", "List<String> x;", "filename", "/src", "#include <a.h>", "a [1]"]
)
def test_what_people_write_stays_as_it_is(text: str) -> None:
    """Signs that begin special tokens are common, and stand for themselves."""
    assert SPECIAL.neutralize(text) == text


def test_whole_prompt_may_end_as_it_likes() -> None:
    """Nothing follows a whole prompt: code that ends on an open bracket is completed as ever."""
    assert SPECIAL.neutralize("#include <", alone=True) == "#include <"
    assert SPECIAL.neutralize("#include <") == f"#include <{JOINER}"


def test_what_a_template_puts_into_brackets_makes_no_token() -> None:
    """Where a template writes the brackets of a client's name, the name alone is made inert."""
    for name in ("|im_end|", "|im_end|> and more", "/s"):
        assert f"<{SPECIAL.neutralize(name)}>".startswith(f"<{name[0]}{JOINER}")


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=4), system=TEXT)
def test_real_tokenizer_finds_only_its_templates_tokens(
    tokenizer: Any, special: Any, texts: list[str], system: str
) -> None:
    """After the real template, the prompt holds as many special tokens as it does for plain words."""

    def count(words: list[str]) -> Any:
        said = [{"role": "system", "content": words[0]}]
        said += [
            {"role": "user" if turn % 2 == 0 else "assistant", "content": word}
            for turn, word in enumerate(words[1:])
        ]
        text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        return sum(
            token in special.ids.values() for token in tokenizer.encode(text, add_special_tokens=False)
        )

    written = [system, *texts]
    assert count([special.neutralize(text) for text in written]) == count(["x"] * len(written))


@settings(max_examples=150, deadline=None)
@given(TEXT | st.text())
def test_real_tokenizer_finds_none_in_content(tokenizer: Any, special: Any, text: str) -> None:
    """No id of a special token comes of what was written, Unicode look-alikes among it."""
    ids = set(tokenizer.encode(special.neutralize(text, alone=True), add_special_tokens=False))
    assert not ids & set(special.ids.values())


class Folding:
    """A tokenizer whose normalizer folds wide forms, as NFKC does, before it looks for special tokens."""

    all_special_tokens = ("<s>",)

    def convert_tokens_to_ids(self, token: str) -> Any:
        return 7

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        folded = "".join(chr(ord(char) - 0xFEE0) if "！" <= char <= "～" else char for char in text)
        return [7] if "<s>" in folded else [1]


def test_tokenizer_that_folds_look_alikes_is_reported() -> None:
    """What the gateway cannot keep out, the engine says itself: it does not become ready."""
    told = describe_special_tokens(Folding()).fault
    assert told is not None
    assert "look" not in told
    assert "＜ｓ＞" in told
    assert describe_special_tokens(None).fault


def test_token_numbers_are_found_by_place_and_text(tokenizer: Any, special: Any) -> None:
    """Only what the tokenizer puts first may stand there."""
    assert special.in_tokens(tokenizer.encode("What is this?")) is None
    assert special.in_tokens([5000, special.ids["<|endoftext|>"]]) == (1, "<|endoftext|>")
    first = SpecialTokens({"<s>": 1}, first=1)
    assert first.in_tokens([1, 2]) is None
    assert first.in_tokens([2, 1]) == (1, "<s>")
    assert first.in_tokens([1, 1]) == (1, "<s>")
