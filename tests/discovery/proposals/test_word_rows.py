"""Rows against words: which tokens are suppressed, and what the rows do at a layer of a tiny model."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.gates.contrast import Contrast, Judged
from discovery.jobs.progress import Meter
from discovery.proposals.avoid.answer_trait import Sampled
from discovery.proposals.avoid.unwanted_words import (
    SuppressedToken,
    spellings,
    suppressed_tokens,
    unwanted_words,
)
from discovery.proposals.avoid.word_rows import (
    WORD_RATE,
    WordStates,
    begun,
    centred_unembedding,
    likeliest,
    word_rows,
    word_states,
)

WORDS = Judged(kind="words", words=("zzz", "yyy"))


def test_word_is_suppressed_at_the_token_that_is_used_least_elsewhere() -> None:
    """Of 7 8 9 the token 8 is the rarest; a beginning is needed, so the first token is never it."""
    assert suppressed_tokens([(7, 8, 9)], {7: 0, 8: 1, 9: 5}) == [SuppressedToken(8, ((7,),))]
    assert suppressed_tokens([(7,)], {7: 100}) == [SuppressedToken(7, ((),))]


def test_words_that_share_a_suppressed_token_share_its_row() -> None:
    """One row suppresses 8 after 7 and after 6; a word that contains a suppressed one needs no other."""
    pieces = suppressed_tokens([(7, 8), (6, 8), (5, 7, 8), (7, 8, 9)], Counter({9: 0}))
    assert pieces == [SuppressedToken(8, ((6,), (7,)))]


def test_unwanted_words_come_from_the_class_and_from_what_its_judge_marks() -> None:
    """The judge's own come first, then the class file's, then the marked ones of the prompts by frequency."""
    prompts: dict[str, dict[str, tuple[str, ...]]] = {}
    contrast = Contrast("rude", "avoid", Judged(kind="toxicity"), (), prompts, words=("twats",))
    texts = ["Shit happens, he said.", "That shit? A pile of f***.", "the assessment passed"]
    assert unwanted_words(contrast, texts) == ["twats", "shit", "f***"]
    with pytest.raises(DiscoveryError, match="'harmless', which its judge does not mark"):
        unwanted_words(Contrast("rude", "avoid", WORDS, (), prompts, words=("harmless",)), [])
    plain = Contrast("loud", "avoid", WORDS, (), prompts)
    assert unwanted_words(plain, ["no such words"]) == ["zzz", "yyy"]


def test_spellings_are_marked_by_the_judge_and_follow_a_lead(tiny: FrozenModel) -> None:
    """A first name with a capital is not profanity, so only the judge's spelling is suppressed."""
    found = [tiny.decode(tokens) for tokens in spellings(tiny, Judged(kind="toxicity"), ["dick"])]
    assert found
    assert all(text.endswith("dick") and text != "dick" for text in found)
    with pytest.raises(DiscoveryError, match="add `words` to the class file"):
        spellings(tiny, WORDS, ["harmless"])


def test_state_and_probability_are_read_where_a_word_has_begun(tiny: FrozenModel) -> None:
    """State and probability are read at the end of each place, whatever its length and batch."""
    samples = [Sampled((1, 2, 3), tuple(range(30, 30 + length)), None) for length in (4, 9, 17)]
    pieces = [SuppressedToken(20, ((21,), (22, 23))), SuppressedToken(50, ((),))]
    places = begun(samples, pieces, 0)
    assert {ids[-1] for number, ids in places if number == 0} == {21, 23}
    found = word_states(tiny, places, pieces, [2], Meter("words", len(places), "places"))
    for place in (0, len(places) // 2, len(places) - 1):
        number, ids = places[place]
        tokens = torch.tensor([ids])
        state = tiny.residuals(tokens, torch.ones_like(tokens), [2])[2][0, -1].float()
        torch.testing.assert_close(found.states[2][place], state, rtol=1e-4, atol=1e-4)
        likely = tiny.network(input_ids=tokens).logits[0, -1].float().softmax(-1)[pieces[number].token]
        torch.testing.assert_close(found.likely[place], likely, rtol=1e-3, atol=1e-6)
    assert likeliest(found, 2, 1) == likeliest(found, 2, 2)[:1]


def test_rows_lower_their_word_where_it_has_begun_and_spare_other_tokens(tiny: FrozenModel) -> None:
    """The word's logit falls by about alpha, others stay; one in 1000 other tokens is touched."""
    generator = torch.Generator().manual_seed(3)
    others = torch.randn(4000, tiny.spec.hidden_size, generator=generator)
    begins = torch.randn(tiny.spec.hidden_size, generator=generator) * 1.5
    states = torch.randn(40, tiny.spec.hidden_size, generator=generator) + begins
    pieces = [SuppressedToken(20, ((21,),)), SuppressedToken(50, ((),))]
    piece = torch.tensor([0] * 30 + [1] * 10)
    found = WordStates({2: states}, piece, torch.linspace(0.2, 0.4, 40))
    rows = word_rows(tiny, 2, pieces, [1, 0], found, others)

    def edited(x: torch.Tensor) -> torch.Tensor:
        return x + 6.0 * (x @ rows.read.T + rows.bias).clamp(min=0) @ rows.write

    unembed = centred_unembedding(tiny)
    scale = others.square().mean(-1).sqrt().median()
    moved = (edited(states[:30]) - states[:30]) @ unembed.T / scale
    assert 4 < -moved[:, 20].median() < 9
    rest = [token for token in range(tiny.spec.vocab_size) if token not in (20, 50)]
    assert moved[:, rest].abs().median() < 1
    touched = ((others @ rows.read.T + rows.bias) > 0).float().mean(0)
    assert (touched - WORD_RATE).abs().max() < WORD_RATE
    assert torch.corrcoef(torch.stack([others @ rows.read[0], others @ unembed[50]]))[0, 1] > 0.5


def test_word_rows_are_for_classes_to_avoid(
    mechctl: Callable[..., tuple[int, str, str]], class_file: Callable[..., Path]
) -> None:
    """A class whose prompts want an answer has no words to suppress: one line says so."""
    status, _, errors = mechctl("propose", "--contrast", class_file(), "--method", "word-rows")
    assert status == 2
    assert "aim = 'answer', but word-rows suppress words in answers" in errors
