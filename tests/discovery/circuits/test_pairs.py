"""Pairs as the public data sets write them: IOI's names, greater-than's years, classes with known answers."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from discovery.circuits.metric import measure
from discovery.circuits.pairs import Pair, batches, encode_pairs, read_pairs, split_pairs
from discovery.circuits.search_settings import PairFormat
from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel

SHIPPED = Path(__file__).parents[3] / "discovery" / "prompts" / "pairs"
IOI = (
    ",clean,corrupted,corrupted_hard,correct_idx,incorrect_idx\n"
    '1,"Then, Aaron and Amber sat. Aaron gave a drink to",'
    '"Then, Aaron and Amber sat. Tiffany gave a drink to",'
    '"Then, Aaron and Amber sat. Amber gave a drink to",4,2\n'
)


def test_ioi_answer_is_the_name_said_once(tmp_path: Path) -> None:
    """The indices of another tokenizer are not used: the names are read from the prompt."""
    path = tmp_path / "ioi.csv"
    path.write_text(IOI)
    pair = read_pairs(path, PairFormat(layout="ioi", corrupted_column="corrupted_hard"))[0]
    assert (pair.answers, pair.wrong) == ((" Amber",), (" Aaron",))
    assert pair.corrupted.endswith("Amber gave a drink to")
    assert "Tiffany" in read_pairs(path, PairFormat(layout="ioi"))[0].corrupted


def test_greater_than_follows_the_tokenizer(tmp_path: Path) -> None:
    """Years where two digits are one token, decades where each digit is one."""
    path = tmp_path / "years.csv"
    path.write_text("clean,corrupted,label\nfrom 1352 to 13,from 1301 to 13,52\n")
    pair_format = PairFormat(layout="greater-than")
    years = read_pairs(path, pair_format)[0]
    assert (years.answers[0], years.answers[-1], len(years.wrong)) == ("53", "99", 53)
    decades = read_pairs(path, pair_format, whole_years=False)[0]
    assert (decades.answers, decades.wrong) == (tuple("6789"), tuple("01234"))


def test_chat_prompts_and_skipped_pairs(tiny: FrozenModel, tmp_path: Path) -> None:
    """In chat format both prompts grow alike; a pair of unequal length is skipped when asked, and counted."""
    path = tmp_path / "pairs.csv"
    path.write_text("clean,corrupted,answer,wrong\nhow,who,I|S,T\nhow,howl,I,S\n")
    with pytest.raises(DiscoveryError, match=r"row 2: clean has 3 tokens and corrupted 4"):
        encode_pairs(tiny, read_pairs(path, PairFormat()), PairFormat())
    pair_format = PairFormat(chat=True, skip_unfit=True)
    found, skipped = encode_pairs(tiny, read_pairs(path, pair_format), pair_format)
    assert (len(found), skipped) == (1, 1)
    assert list(found[0].clean) == tiny.chat_ids("how")
    assert len(found[0].answers) == 2


def test_batches_hold_one_length_and_every_pair() -> None:
    """No padding: each batch is of one length, and no pair is lost."""
    pairs = [Pair((1,) * n, (2,) * n, (1,), (2,)) for n in (3, 4, 3, 3, 5)]
    found = list(batches(pairs, 2))
    assert sorted(index for part in found for index in part) == [0, 1, 2, 3, 4]
    assert all(len({len(pairs[i].clean) for i in part}) == 1 and len(part) <= 2 for part in found)


def test_discovery_and_evaluation_share_no_pair() -> None:
    """The split is the same every time and has no pair on both sides."""
    pairs = [Pair((n,), (n + 1,), (1,), (2,)) for n in range(10)]
    discovery, evaluation = split_pairs(pairs, 0.3, None)
    assert (len(discovery), len(evaluation)) == (7, 3)
    assert not set(discovery) & set(evaluation)
    assert split_pairs(pairs, 0.3, None) == (discovery, evaluation)


def test_metrics_by_hand() -> None:
    """Logit difference, log odds and difference of probability on three logits, worked out by hand."""
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log() + 7
    pair = [Pair((1,), (2,), (0, 1), (2,))]
    difference = (0.2 * 0.5) ** 0.5 / 0.3
    assert measure("logit_diff", logits, pair).exp().item() == pytest.approx(difference)
    assert measure("log_odds", logits, pair).exp().item() == pytest.approx(7 / 3)
    assert measure("prob_diff", logits, pair).item() == pytest.approx(0.4)


def test_a_topic_is_never_on_both_sides(pairs: list[Pair]) -> None:
    """Wordings of one topic are searched or measured together; without topics the split is by pair."""
    named = [replace(pair, topic=f"t{index % 4}") for index, pair in enumerate(pairs)]
    for held_out in (0.3, 0.5, 0.7):
        found, measured = split_pairs(named, held_out, None)
        assert len(found) + len(measured) == len(pairs)
        assert not {pair.topic for pair in found} & {pair.topic for pair in measured}
    assert [len(side) for side in split_pairs(pairs, 0.5, None)] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "chat", "fewest"), [("jailbreak", True, 60), ("toxicity", False, 60)])
def test_shipped_pairs_fit_the_default_model(
    default_model_dir: Path, name: str, chat: bool, fewest: int
) -> None:
    """None is of unequal length or without an answer of its own; wordings are many and equally frequent;
    the model itself favours the answers more on the clean prompt, on average and for nine in ten pairs."""
    model = FrozenModel(default_model_dir, torch.float32)
    pair_format = PairFormat(chat=chat)
    found, skipped = encode_pairs(model, read_pairs(SHIPPED / f"{name}.jsonl", pair_format), pair_format)
    assert skipped == 0
    assert len(found) >= fewest
    wordings = Counter(pair.paraphrase for pair in found)
    assert len(wordings) >= 3
    assert len(set(wordings.values())) == 1
    assert all(pair.topic for pair in found)
    gained = []
    with torch.no_grad():
        for pair in found:
            logits = model.network(input_ids=torch.tensor([pair.clean, pair.corrupted])).logits[:, -1]
            clean, corrupted = measure("logit_diff", logits, [pair, pair])
            gained.append(float(clean - corrupted))
    assert sum(gain > 0 for gain in gained) >= 0.9 * len(gained)
    assert sum(gained) / len(gained) > 1
