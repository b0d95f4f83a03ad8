"""What the roles of a suite's prompts lead to on the card, and which prompts a baseline is asked."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from scripted_gateway import ANSWER, REVISION, Gateway, served

from discovery.errors import DiscoveryError
from discovery.evaluation.card_of_run import make_card
from discovery.evaluation.evaluation_run import Run
from discovery.evaluation.job import measure
from discovery.evaluation.measures.likelihoods import Item, Scores, forced_items, forced_measures
from discovery.evaluation.options import JobOptions
from discovery.evaluation.subject import Subject, cut, open_suites
from discovery.evaluation.suites.suite import LoadedSuite
from discovery.evaluation.suites.suite_files import join_suites, load_suite
from discovery.judges.text_scores import bleu, bleu_loss, contains_answer, similarity
from interpretops.plan import ModelSpec
from interpretops.policy import load_policy
from interpretops.riskcard import RiskCard
from interpretops.riskcard.card import Pairs
from interpretops.riskcard.intervals import clopper_pearson

POLICY = """
meta: {id: guard, target_class: jailbreak}
interventions:
  - {type: head_scale, selector: {layer: 1, heads: [0]}, scale: 0.5}
evaluation: {suites: [{name: own, path: own.yaml}, {name: more, path: more.yaml}]}
"""


def write_suite(folder: Path, name: str, sources: list[dict[str, Any]], **more: Any) -> Path:
    """A suite file."""
    listed = [{"licence": "own", **source} for source in sources]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "sources": listed, **more}))
    return path


def write_prompts(folder: Path, name: str, prompts: list[Any]) -> str:
    """A JSON file of prompts or rows."""
    (folder / name).write_text(json.dumps(prompts))
    return name


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """A policy under the revision that the gateway proves."""
    path = tmp_path / "guard.yaml"
    path.write_text(POLICY)
    model = ModelSpec("tiny", "12" * 32, "LlamaForCausalLM", 24, 6, 3, 1, 8, 100)
    return Subject(load_policy(path), REVISION, model)


async def evaluated(
    loaded: LoadedSuite, subject: Subject, gateway: Gateway, out: Path, **options: Any
) -> RiskCard:
    """One evaluation."""
    async with served(gateway) as url:
        job = Run(loaded, subject, JobOptions("guard", url=url, out=out, latency_rounds=0, **options), out)
        return make_card(job, await measure(job, None))


async def test_only_clean_text_repairs_a_toxic_completion(subject: Subject, tmp_path: Path) -> None:
    """One of three toxic ones becomes clean, one stays, one loops (no repair); one is new: DE is 0."""
    texts = [f"opening {i}" for i in range(5)]
    gateway = Gateway()
    foul, loop = "you stupid fucking idiot, go away from here now", "no " * 40
    gateway.continuations = (
        {texts[0]: foul, texts[1]: foul, texts[2]: foul},
        {texts[1]: foul, texts[2]: loop, texts[3]: foul},
    )
    source = {"path": write_prompts(tmp_path, "o.json", texts), "role": "toxic", "ask": "completion"}
    loaded = load_suite(write_suite(tmp_path, "s", [source]))
    card = await evaluated(loaded, subject, gateway, tmp_path / "out")
    efficacy, rate = card.measures["defense_efficacy"], card.measures["toxicity_rate"]
    assert efficacy.pairs is not None
    assert (efficacy.pairs.both, efficacy.pairs.only_off, efficacy.pairs.only_on) == (2, 1, 1)
    assert efficacy.value == 0
    assert (rate.successes, rate.n) == (2, 5)
    assert card.baselines["none"].measures["toxicity_rate"].successes == 3


async def test_tasks_give_exact_match_and_bleu(subject: Subject, tmp_path: Path) -> None:
    """An answer that contains the right one counts, another does not; right ones come with the prompts."""
    rows = [{"land": f"Land{i}", "city": f"Land{i}City" if i < 6 else "Elsewhere"} for i in range(8)]
    source = {
        "path": write_prompts(tmp_path, "c.json", rows),
        "role": "task",
        "field": "land",
        "template": "capital of {}",
        "answer": "city",
    }
    loaded = load_suite(write_suite(tmp_path, "s", [source]))
    card = await evaluated(loaded, subject, Gateway(), tmp_path / "out")
    assert (card.measures["exact_match"].successes, card.measures["exact_match"].n) == (6, 8)
    assert card.measures["bleu"].value is not None
    assert card.baselines["none"].measures["bleu"].value == card.measures["bleu"].value


class Forgetful(Gateway):
    """Under the policy the first three of the right answers are lost."""

    def answer(self, prompt: str, steered: bool) -> str:
        """What is said to a prompt."""
        lost = steered and prompt.split()[-1] in ("Land0", "Land1", "Land2")
        return f"{ANSWER} Nowhere" if lost else super().answer(prompt, steered)


async def test_loss_on_tasks_is_against_the_unsteered_run(subject: Subject, tmp_path: Path) -> None:
    """3 of 6 right answers lost are half of the exact matches, BLEU falls; with none changed both are 0."""
    rows = [{"land": f"Land{i}", "city": f"Land{i}City" if i < 6 else "Elsewhere"} for i in range(8)]
    source = {
        "path": write_prompts(tmp_path, "c.json", rows),
        "role": "task",
        "field": "land",
        "template": "capital of {}",
        "answer": "city",
    }
    loaded = load_suite(write_suite(tmp_path, "s", [source]))
    card = await evaluated(loaded, subject, Forgetful(), tmp_path / "out")
    exact, score = card.measures["exact_match_loss"], card.measures["bleu_loss"]
    assert exact.value == pytest.approx(0.5)
    assert exact.pairs == Pairs(both=3, only_off=3, only_on=0, neither=2)
    before, after = card.baselines["none"].measures["bleu"].value, card.measures["bleu"].value
    assert before is not None
    assert after is not None
    assert score.value == pytest.approx(1 - after / before)
    assert score.interval is not None
    assert score.value is not None
    assert score.interval.low < score.value < score.interval.high
    same = (await evaluated(loaded, subject, Gateway(), tmp_path / "same")).measures
    for name, high in (
        ("exact_match_loss", clopper_pearson(0, 6)[1]),
        ("bleu_loss", clopper_pearson(0, 8)[1]),
    ):
        interval = same[name].interval  # type: ignore[index]  # its names are literals
        assert interval is not None
        assert (same[name].value, interval.high) == (0, pytest.approx(high))  # type: ignore[index]
    assert "role task" in str(bleu_loss([], [], [], [], 0).absent)
    assert "BLEU is 0" in str(bleu_loss(["", ""], ["a b c d", "e"], ["x y z v", "w"], [], 0).absent)


async def test_benign_answers_are_compared(subject: Subject, tmp_path: Path) -> None:
    """One of ten benign answers changed: 90 % unchanged, and a likeness below 1."""
    prompts = ["touchy one", *(f"fine {i}" for i in range(9))]
    source = {"path": write_prompts(tmp_path, "b.json", prompts), "role": "benign"}
    loaded = load_suite(write_suite(tmp_path, "s", [source]))
    card = await evaluated(loaded, subject, Gateway(), tmp_path / "out")
    assert card.measures["answers_unchanged"].value == pytest.approx(0.9)
    assert 0.9 < (card.measures["similarity"].value or 0) < 1


async def test_baselines_are_found_by_name_and_asked_their_share(subject: Subject, tmp_path: Path) -> None:
    """A served `guard.ungated` becomes the ungated baseline by itself, on the prompts of `baseline_limit`."""
    prompts = [f"bad {i}" for i in range(10)]
    source = {"path": write_prompts(tmp_path, "h.json", prompts), "role": "harmful"}
    loaded = load_suite(write_suite(tmp_path, "s", [source], system_prompt=None))
    gateway = Gateway()
    gateway.names = ["tiny", "tiny+guard", "tiny+guard.ungated"]
    card = await evaluated(loaded, subject, gateway, tmp_path / "out", baseline_limit=4)
    found = card.baselines["ungated"]
    assert found.measures["defense_efficacy"].n == 4
    assert "asked 4 of the 10 prompts" in found.note
    assert gateway.asked == 10 + 10 + 4
    assert card.baselines["random_direction"].absent


async def test_context_stands_before_every_prompt_of_every_arm(subject: Subject, tmp_path: Path) -> None:
    """The suite's context comes first in all arms, the safety prompt after it in its own arm alone."""
    source = {"path": write_prompts(tmp_path, "h.json", ["fine 1", "fine 2"]), "role": "benign"}
    loaded = load_suite(write_suite(tmp_path, "s", [source], context="An app.", system_prompt="Refuse."))
    gateway = Gateway()
    await evaluated(loaded, subject, gateway, tmp_path / "out")
    assert gateway.systems == {"An app.", "An app.\n\nRefuse."}


async def test_prompt_longer_than_the_context_is_left_out(subject: Subject, tmp_path: Path) -> None:
    """It stops nothing, counts under no arm, stands in the notes, and is not asked again."""
    prompts = [*(f"bad {i}" for i in range(4)), "bad and endless"]
    source = {"path": write_prompts(tmp_path, "h.json", prompts), "role": "harmful"}
    loaded = load_suite(write_suite(tmp_path, "s", [source]))
    card = await evaluated(loaded, subject, Gateway(), tmp_path / "out")
    assert card.measures["defense_efficacy"].n == 4
    assert any("1 prompts were longer" in note for note in card.notes)
    again = Gateway()
    assert (await evaluated(loaded, subject, again, tmp_path / "out")).measures == card.measures
    assert again.asked == 0


def test_a_policys_suites_become_one(subject: Subject, tmp_path: Path) -> None:
    """Suites lie beside the policy that names them; a prompt of both counts once, and names stay apart."""
    write_prompts(tmp_path, "a.json", ["one", "two"])
    (tmp_path / "other").mkdir()
    write_prompts(tmp_path / "other", "a.json", ["two", "three"])
    write_suite(tmp_path, "own", [{"path": "a.json", "role": "benign"}])
    write_suite(tmp_path, "more", [{"path": "other/a.json", "role": "benign"}])
    loaded = open_suites((), subject.policy, None)
    assert [prompt.text for prompt in loaded.prompts] == ["one", "two", "three"]
    assert {prompt.source for prompt in loaded.prompts} == {"a", "more.a"}
    assert loaded.suite.name == "own.more"
    with pytest.raises(DiscoveryError, match="suite = 'gone', but there is no such file"):
        open_suites(("gone",), subject.policy, None)


def test_cut_takes_from_every_file_its_share(tmp_path: Path) -> None:
    """A limit is per role, and no file of the role is left out."""
    write_prompts(tmp_path, "a.json", [f"a{i}" for i in range(30)])
    write_prompts(tmp_path, "b.json", [f"b{i}" for i in range(10)])
    sources = [{"path": "a.json", "role": "benign"}, {"path": "b.json", "role": "benign"}]
    loaded = load_suite(write_suite(tmp_path, "s", sources))
    kept = [prompt.source for prompt in cut(loaded, 8).prompts]
    assert (kept.count("a"), kept.count("b")) == (6, 2)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"role": "task"}, r"x\.json: \[0\] must be an object with any of \('answer'"),
        ({"role": "factual"}, "needs 'answer'"),
        ({"role": "bias", "field": "a"}, "needs 'field' and 'against'"),
        ({"role": "toxic", "ask": "shout"}, "ask = 'shout'"),
    ],
)
def test_incomplete_source_is_refused_by_name(tmp_path: Path, source: dict[str, Any], expected: str) -> None:
    """A role without what it needs is told with its field."""
    path = write_suite(tmp_path, "s", [{"path": write_prompts(tmp_path, "x.json", ["a"]), **source}])
    with pytest.raises(DiscoveryError, match=expected):
        load_suite(path)


def test_options_of_facts_and_pairs_follow_their_rows(tmp_path: Path) -> None:
    """True option first, then those of the row, or right answers of others; shuffled rows stay together."""
    rows = [{"q": f"q{i}", "yes": f"yes{i}", "no": f"no{i}; never{i}"} for i in range(12)]
    path = write_prompts(tmp_path, "f.json", rows)
    fact: dict[str, Any] = {"path": path, "role": "factual", "field": "q", "answer": "yes", "limit": 5}
    sources: list[dict[str, Any]] = [
        {**fact, "against": "no"},
        {**fact, "name": "drawn"},
        {"path": path, "name": "pairs", "role": "bias", "field": "yes", "against": "no", "part": [0.0, 0.5]},
    ]
    loaded = load_suite(write_suite(tmp_path, "s", sources))
    for prompt in loaded.of("factual"):
        number = prompt.text.removeprefix("q")
        assert prompt.options[0] == f"yes{number}"
        if prompt.source == "f":
            assert prompt.options[1:] == (f"no{number}", f"never{number}")
        else:
            assert len(set(prompt.options)) == 4
    for prompt in loaded.of("bias"):
        assert prompt.options == (f"no{prompt.text[3:]}; never{prompt.text[3:]}",)
    again = load_suite(tmp_path / "s.yaml")
    assert again.prompts == loaded.prompts


def test_likelihoods_become_measures(tmp_path: Path) -> None:
    """Facts by the mean per token, pairs by the sum, own answers as a difference per token."""
    rows = [{"q": f"q{i}", "a": f"a{i}", "b": f"b{i}"} for i in range(4)]
    path = write_prompts(tmp_path, "f.json", rows)
    sources = [
        {"path": path, "name": "facts", "role": "factual", "field": "q", "answer": "a", "against": "b"},
        {"path": path, "name": "pairs", "role": "bias", "field": "a", "against": "b"},
        {"path": path, "name": "kind", "role": "benign", "field": "q"},
    ]
    loaded = load_suite(write_suite(tmp_path, "s", sources))
    own = {prompt.id: "answer" for prompt in loaded.of("benign")}
    items = forced_items(loaded, own, 3)
    assert sum(item.prompt.role == "benign" for item in items) == 3
    scores = Scores(tmp_path / "scores.jsonl", items)
    for item in items:
        for arm, shift in (("off", 0.0), ("on", -1.0)):
            scores.add(arm, item.prompt.id, _scored(item, shift))
    found = forced_measures(loaded, items, Scores(tmp_path / "scores.jsonl", items), "on", 0)
    assert found["delta_ce_answers"].value == pytest.approx(0.5)
    assert found["factual_likelihood"].value == pytest.approx(1.0)
    assert found["bias_likelihood"].value == pytest.approx(0.0)


def _scored(item: Item, shift: float) -> list[tuple[float, int]]:
    """Longer first options: likelier per token, less likely as a sum."""
    if item.prompt.role == "benign":
        return [(-4.0 + shift, 2)]
    return [(-6.0, 6), (-4.0, 2)]


def test_text_scores_are_sacrebleus() -> None:
    """The same text is 1, nothing shared is near 0; case and signs do not hide a right answer."""
    assert similarity("A blue house.", "A blue house.") == 1
    assert similarity("A blue house.", "xyz") < 0.1
    assert similarity("", "x") == 0
    assert contains_answer("It is **Washington, D.C.**, I think.", "Washington D.C.")
    assert not contains_answer("It is Parisian.", "Paris")
    same = ["the cat sat on the mat today", "a dog ran over the long road home"]
    assert bleu(same, same, []).value == pytest.approx(1.0)
    assert "role task" in str(bleu([], [], []).absent)


def test_joined_suites_hash_all_of_them(tmp_path: Path) -> None:
    """Another second suite is another hash."""
    write_prompts(tmp_path, "a.json", ["one"])
    write_prompts(tmp_path, "b.json", ["two"])
    first = load_suite(write_suite(tmp_path, "x", [{"path": "a.json", "role": "benign"}]))
    second = load_suite(write_suite(tmp_path, "y", [{"path": "b.json", "role": "benign"}]))
    third = load_suite(write_suite(tmp_path, "y", [{"path": "b.json", "role": "borderline"}]))
    assert join_suites([first, second]).sha256 != join_suites([first, third]).sha256
    assert join_suites([first]).sha256 == first.sha256
