"""Classes to avoid: where a trait begins, the training target, and all three methods on a tiny model."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from discovery.errors import DiscoveryError
from discovery.frozen_model import FrozenModel
from discovery.gates.contrast import Judged
from discovery.gates.gate_probe import Probe
from discovery.gates.low_rank import LowRankRows
from discovery.jobs.progress import Meter
from discovery.judges.toxicity import is_toxic
from discovery.proposals.avoid.answer_trait import (
    Sampled,
    locate,
    sampled_answers,
    trait_tokens,
    trait_vocabulary,
)
from discovery.proposals.avoid.unlikelihood_edit import (
    SUPPRESSION,
    UnlikelihoodSettings,
    initial_rows,
    loss_of,
    target_distribution,
    train_edit,
)
from discovery.proposals.judging import shows
from interpretops.compile import compile_policy
from interpretops.policy import load_policy

Run = Callable[..., tuple[int, str, str]]
ZZZ = Judged(kind="words", words=("zzz",))


def _answers(tiny: FrozenModel, prompts: list[str], most: int = 12, seed: int = 0) -> list[list[int]]:
    ids = [tiny.chat_ids(prompt) for prompt in prompts]
    return sampled_answers(tiny, ids, most, seed, Meter("", 1, ""))


def _trait(tiny: FrozenModel) -> list[str]:
    """As many letters as it takes for one of them to stand alone in a third of the tiny model's answers."""
    texts = [tiny.decode(answer) for answer in _answers(tiny, [f"say {i}" for i in range(48)], 28)]
    for count in range(1, 27):
        words = tuple("abcdefghijklmnopqrstuvwxyz"[:count])
        if sum(shows(Judged(kind="words", words=words), text) for text in texts) >= 16:
            return list(words)
    raise AssertionError("the tiny model writes no letters")


def test_trait_is_located_at_the_token_that_completes_it(tiny: FrozenModel) -> None:
    """The index is that of the first token with which the judge sees the trait, or None."""
    answer = tiny.text_ids("a zzz b")
    found = locate(tiny, ZZZ, tiny.chat_ids("hello"), answer)
    assert found.begins is not None
    assert not shows(ZZZ, tiny.decode(answer[: found.begins]))
    assert shows(ZZZ, tiny.decode(answer[: found.begins + 1]))
    assert locate(tiny, ZZZ, tiny.chat_ids("hello"), tiny.text_ids("a b c")).begins is None


def test_beginning_of_a_longer_word_is_not_the_trait(tiny: FrozenModel) -> None:
    """A beginning that looks like the trait does not count when the next letter makes another word of it."""
    answer = tiny.text_ids("zzzebra and zzz")
    found = locate(tiny, ZZZ, tiny.chat_ids("hello"), answer)
    assert found.begins is not None
    assert tiny.decode(answer[: found.begins + 1]).endswith("and zzz")


def test_trait_vocabulary_is_what_the_judge_marks(tiny: FrozenModel) -> None:
    """Single letters are not words; a token that shows the trait alone is in the vocabulary."""
    assert trait_vocabulary(tiny, ZZZ) == []
    special = tiny.tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert trait_vocabulary(tiny, Judged(kind="words", words=("im_start",))) == [special]


def test_tokens_before_the_trait_are_separated_from_the_others(tiny: FrozenModel) -> None:
    """`trait` holds the activation from which the trait was predicted, `other` those of clean answers."""
    prompt, answer = tuple(tiny.chat_ids("hello")), tuple(tiny.text_ids("abzzz"))
    samples = [Sampled(prompt, answer, 4), Sampled(prompt, answer, None)]
    found = trait_tokens(tiny, samples, [2], 100, Meter("", 2, ""))
    tokens, mask = tiny.pad([[*prompt, *answer]])
    x = tiny.residuals(tokens, mask, [2])[2][0].float()
    torch.testing.assert_close(found["trait/2"][-1], x[len(prompt) + 3], rtol=1e-4, atol=1e-4)
    assert len(found["trait/2"]) == 3
    assert len(found["other/2"]) == len(answer)


def test_target_moves_probability_from_the_words_to_the_rest() -> None:
    """The target is a distribution; suppressed tokens keep 1/50 of their odds, others their proportions."""
    logits = torch.randn(1, 2, 6, generator=torch.Generator().manual_seed(0))
    target, suppressed = target_distribution(logits, torch.tensor([1]), [(0, 1, 4)])
    own = logits.softmax(-1)
    torch.testing.assert_close(target.exp().sum(-1), torch.ones(1, 2))
    odds = (target[0, 0, 1] - target[0, 0, 0]).exp() / (own[0, 0, 1] / own[0, 0, 0])
    assert float(odds) == pytest.approx(1 / SUPPRESSION, rel=1e-4)
    assert float((target[0, 0, 4] - target[0, 0, 0]).exp()) == pytest.approx(
        float(own[0, 0, 4] / own[0, 0, 0])
    )
    assert float((target[0, 1, 4] - target[0, 1, 0]).exp()) < float(own[0, 1, 4] / own[0, 1, 0]) / 40
    assert float(suppressed[0, 0]) == pytest.approx(float(own[0, 0, 1]) * (1 - 1 / SUPPRESSION), rel=1e-4)


def _edit(tiny: FrozenModel, settings: UnlikelihoodSettings) -> LowRankRows:
    probe = Probe(torch.randn(tiny.spec.hidden_size, generator=torch.Generator().manual_seed(1)) * 0.1, 0.0)
    return initial_rows(tiny, settings, {2: probe}, {2: 0.0}, {2: 5.0}, {2: 1e6})


def test_killed_training_ends_with_the_same_rows(tiny: FrozenModel, tmp_path: Path) -> None:
    """Training lowers the loss; a run resumed from a checkpoint ends with an uninterrupted run's rows."""
    settings = UnlikelihoodSettings((2,), rank=4, steps=40, batch=2, learning_rate=1e-2)
    prompts = [f"say {i}" for i in range(6)]
    samples = [
        Sampled(tuple(tiny.chat_ids(p)), tuple(a), None)
        for p, a in zip(prompts, _answers(tiny, prompts), strict=True)
        if a
    ]
    words = sorted({token for sample in samples for token in sample.answer})[:3]
    unwanted = torch.tensor(words)
    before = loss_of(tiny, _edit(tiny, settings), samples, unwanted).item()
    whole = train_edit(tiny, _edit(tiny, settings), [samples], words, settings, tmp_path / "whole", "run")
    assert loss_of(tiny, whole, samples, unwanted).item() < before

    def dies(step: int) -> None:
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_edit(tiny, _edit(tiny, settings), [samples], words, settings, tmp_path / "broken", "run", dies)
    for run, parts, other_words in (
        ("other", [samples], words),
        ("run", [samples[1:]], words),
        ("run", [samples], words[1:]),
    ):
        with pytest.raises(DiscoveryError, match=r"broken: belongs to another run: .*; delete it"):
            train_edit(tiny, _edit(tiny, settings), parts, other_words, settings, tmp_path / "broken", run)
    resumed = train_edit(tiny, _edit(tiny, settings), [samples], words, settings, tmp_path / "broken", "run")
    for (name, value), (_, other) in zip(whole.named_parameters(), resumed.named_parameters(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("method", ["direction", "sae-feature", "gated-edit", "word-rows"])
def test_every_method_writes_a_stateless_policy_or_says_why_not(
    mechctl: Run,
    class_file: Callable[..., Path],
    dictionary: Callable[..., Path],
    tiny: FrozenModel,
    tmp_path: Path,
    method: str,
) -> None:
    """Every point is in the record with rate, damage and text cost; no policy latches or waits."""
    (tmp_path / "book.txt").write_text("It was a dark night and the wind was cold. " * 60)
    path = class_file(
        aim="avoid",
        judge={"kind": "words", "words": _trait(tiny)},
        target=[f"say {i}" for i in range(60)],
        text=[{"path": "book.txt", "licence": "own"}],
    )
    out = tmp_path / "policies" / "less.yaml"
    arguments = ("--contrast", path, "--method", method, "--policy-id", "less", "--out", out, "--layers", 2)
    wide = ("--benign-budget", 1, "--text-budget", 100, "--steps", 20, "--rank", 4, "--answer-tokens", 6)
    folder = ("--model", tiny.folder, "--artifacts", dictionary(), "--work", tmp_path / "work")
    status, _, errors = mechctl("propose", *arguments, *wide, *folder)
    assert status == 0 or "no point of the grid" in errors
    record = json.loads((tmp_path / "policies" / "records" / "less.json").read_text())
    assert {"trait_rate", "own_rate", "damage", "text_cost"} <= set(record["curve"][0])
    assert record["discovery_samples"]["with_trait"] >= 4
    if status:
        assert "no point of the grid" in errors
        return
    plan = compile_policy(load_policy(out), model=tiny.spec, artifacts=tmp_path / "artifacts")
    assert plan.revision == record["revision"]
    assert all(gate.scope == "token" and not gate.latched for gate in plan.gates)
    assert record["chosen"] in record["curve"]


def test_class_whose_trait_never_shows_is_refused_in_one_line(
    mechctl: Run, class_file: Callable[..., Path], tiny: FrozenModel, tmp_path: Path
) -> None:
    """When no sampled answer shows the trait there is no contrast, and the line says so."""
    path = class_file(aim="avoid", target=[f"say {i}" for i in range(20)])
    status, _, errors = mechctl(
        "propose", "--contrast", path, "--model", tiny.folder, "--work", tmp_path / "work"
    )
    assert status == 2
    assert "0 of 12 continuations show the trait" in errors


@pytest.mark.parametrize(
    ("text", "toxic"),
    [
        ("What the F**k is that", True),
        ("you dumbass", True),
        ("they said that women should be killed", True),
        ("Dick Cheney passed the assessment in Scunthorpe", False),
        ("A classic cocktail with grapes", False),
        ("Immigrants are welcome here", False),
    ],
)
def test_toxicity_is_read_from_whole_words(text: str, toxic: bool) -> None:
    """Profanity, masked too, and calls for violence count; words that merely contain one do not."""
    assert is_toxic(text) is toxic
