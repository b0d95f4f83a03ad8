"""The Risk Card: its intervals, its verdict by the bound, its file, and the forms it is shown in."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from scipy.stats import binomtest

from interpretops.policy import Evaluation, Policy, SuccessCriteria, load_policy
from interpretops.riskcard import RiskCard, RiskCardError, load_card, save_card, standing, verdict
from interpretops.riskcard.card import (
    BASELINES,
    MEASURES,
    Baseline,
    CircuitReference,
    Contribution,
    Interval,
    Latency,
    Measure,
    MeasureName,
    ModelReference,
    Pairs,
    PolicyReference,
    Record,
    Source,
)
from interpretops.riskcard.intervals import bootstrap_mean, clopper_pearson
from interpretops.riskcard.latency import Timing
from interpretops.riskcard.markdown import card_markdown, comparison_markdown
from interpretops.riskcard.measures import (
    absent,
    defense_efficacy,
    exact_match_loss,
    mean_difference,
    new_failures,
    rate,
)
from interpretops.riskcard.page import card_html
from interpretops.riskcard.verdict import BY_SOURCE, CRITERIA
from mechctl.main import main

REFERENCE_POLICY = Path(__file__).resolve().parents[2] / "fixtures" / "reference-policy.yaml"
DATA = (Source(name="own", sha256="cd" * 32, n=400, successes=8),)


@pytest.fixture
def make_card() -> Callable[..., RiskCard]:
    """A card of 100 attacks, 97 stopped, and 400 benign prompts with 8 new refusals."""

    def make(**changes: Any) -> RiskCard:
        measures: dict[str, Measure] = {name: absent("not asked for") for name in MEASURES}
        measures["defense_efficacy"] = defense_efficacy(Pairs(both=3, only_off=97, only_on=0, neither=0))
        measures["collateral_damage"] = new_failures(
            Pairs(both=0, only_off=0, only_on=8, neither=392), data=DATA
        )
        measures["delta_ce"] = mean_difference([3.0, 3.1, 2.9], [3.01, 3.1, 2.92], [10, 20, 30], data=())
        values: dict[str, Any] = {
            "policy": PolicyReference(id="guard", revision="ab" * 32, target_class="jailbreak"),
            "model": ModelReference(name="tiny", fingerprint="12" * 32),
            "criteria": SuccessCriteria(defense_efficacy_min=0.9, collateral_damage_max=0.05),
            "measures": measures,
            "baselines": {kind: Baseline(absent="not asked for") for kind in BASELINES}
            | {"system_prompt": Baseline(measures={"collateral_damage": rate(40, 400)})},
            "circuit": CircuitReference(absent="not made from one"),
            "record": Record(
                command="mechctl eval --policy guard",
                suite="own",
                suite_sha256="ef" * 32,
                commit="0" * 40,
                versions={"python": "3.11"},
                machine="Linux x86_64",
            ),
            "notes": ("says <nothing> about | images",),
        }
        return RiskCard(**(values | changes))

    return make


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 30), (8, 400), (97, 100), (1999, 2000), (5, 9)])
def test_exact_interval_is_scipys(k: int, n: int) -> None:
    """Our Clopper-Pearson bounds are those of scipy's exact binomial test."""
    right = binomtest(k, n).proportion_ci(method="exact")
    assert clopper_pearson(k, n) == pytest.approx((right.low, right.high), abs=1e-9)


def test_eight_new_refusals_of_400_bound_at_four_per_cent(make_card: Callable[..., RiskCard]) -> None:
    """A point of 2 % with an upper bound of 3.9 % meets 5 % and 4 %, and fails 3 %: the bound decides."""
    card = make_card()
    measure = card.measures["collateral_damage"]
    assert measure.interval is not None
    assert (measure.value, round(measure.interval.high, 3)) == (0.02, 0.039)
    assert verdict(card, SuccessCriteria(collateral_damage_max=0.04)).passed
    assert verdict(card, SuccessCriteria(collateral_damage_max=0.03)).status == "fail"


def test_efficacy_is_judged_by_its_lower_bound(make_card: Callable[..., RiskCard]) -> None:
    """97 of 100 stopped meet a demand of 90 % (bound 91 %) and not 95 %, though the point does."""
    card = make_card()
    assert card.measures["defense_efficacy"].value == pytest.approx(0.97)
    assert verdict(card).passed
    assert not verdict(card, SuccessCriteria(defense_efficacy_min=0.95)).passed


def test_no_measure_and_no_criteria_never_pass(make_card: Callable[..., RiskCard]) -> None:
    """A demanded measure that is absent fails; a card without any criterion is not said to pass."""
    card = make_card()
    bare = card.model_copy(update={"measures": {name: absent("-") for name in MEASURES}})
    found = verdict(bare)
    assert found.status == "fail"
    assert "was not measured" in found.findings[0].line()
    assert verdict(card, SuccessCriteria()).status == "no criteria"
    assert not verdict(card, SuccessCriteria()).passed


def test_zero_by_construction_meets_no_bar(make_card: Callable[..., RiskCard]) -> None:
    """A ΔCE read where nothing is edited counts as absent: ΔCE answers stands for it, or it fails."""

    def judged(**measures: Measure) -> Any:
        card = make_card()
        card = card.model_copy(update={"measures": {**card.measures, **measures}})
        (found,) = verdict(card, SuccessCriteria(delta_ce_max=0.02)).findings
        return found

    zero = mean_difference([3.0, 3.1], [3.0, 3.1], [10, 20], data=())
    noise = mean_difference([3.0, 3.1], [3.0 - 1e-8, 3.1 + 2e-8], [10, 20], data=())
    small = mean_difference([3.0, 3.1], [3.001, 3.102], [10, 20], data=())
    large = mean_difference([3.0, 3.1], [3.2, 3.4], [10, 20], data=())
    for nothing in (zero, noise, absent("not told")):
        assert not judged(delta_ce=nothing).passed
        assert not judged(delta_ce=nothing, delta_ce_answers=large).passed
        stands = judged(delta_ce=nothing, delta_ce_answers=small)
        assert stands.passed
        assert "holds by delta_ce_answers" in stands.line()
    assert judged(delta_ce=nothing, delta_ce_answers=zero).passed
    assert judged(delta_ce=small, delta_ce_answers=large).passed
    assert judged(delta_ce=zero.model_copy(update={"after_prompt": True})).passed


def test_stopping_every_attack_still_has_a_width() -> None:
    """With all of 50 attacks stopped DE is 1, and its lower bound that of 50 of 50, not 1."""
    found = defense_efficacy(Pairs(both=0, only_off=50, only_on=0, neither=5))
    assert found.interval is not None
    assert found.value == 1
    assert found.interval.low == pytest.approx(clopper_pearson(50, 50)[0])


def test_attacks_that_only_succeed_with_the_policy_count_against_it() -> None:
    """DE compares both rates: 10 attacks stopped and 10 new ones make zero, more new ones less than zero."""
    assert defense_efficacy(Pairs(both=5, only_off=10, only_on=10, neither=5)).value == pytest.approx(0)
    worse = defense_efficacy(Pairs(both=5, only_off=5, only_on=10, neither=5)).value
    assert worse == pytest.approx(-0.5)


def test_nothing_to_measure_is_absent_with_its_reason() -> None:
    """No attack succeeds unsteered, no benign prompt is answered, no text: no number is made up."""
    assert "no attack succeeds" in str(
        defense_efficacy(Pairs(both=0, only_off=0, only_on=3, neither=2)).absent
    )
    assert new_failures(Pairs(both=4, only_off=1, only_on=0, neither=0)).absent
    assert mean_difference([1.0], [1.0], [5], data=()).absent


def test_bootstrap_repeats_itself_and_covers_the_mean() -> None:
    """The same seed gives the same interval; that of 200 normal values agrees with theory to 15 %."""
    import numpy as np

    values = np.random.default_rng(1).normal(size=200)
    low, high = bootstrap_mean(list(values), seed=3)
    assert (low, high) == bootstrap_mean(list(values), seed=3)
    assert low < values.mean() < high
    assert (high - low) == pytest.approx(2 * 1.96 * values.std() / 200**0.5, rel=0.15)


def test_card_is_read_back_as_it_was(make_card: Callable[..., RiskCard], tmp_path: Path) -> None:
    """Saving and loading gives an equal card; saving again the same bytes."""
    card = make_card()
    save_card(card, tmp_path / "card.json")
    loaded = load_card(tmp_path / "card.json", revision="ab" * 32)
    assert loaded == card
    save_card(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "card.json").read_bytes()


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("policy", "revision"), "ac" * 32, "was changed after it was made"),
        (("measures", "collateral_damage", "successes"), 7, "7 of 400 give"),
        (("measures", "defense_efficacy", "value"), 0.96, "pairs give 3 after 100"),
        (("record", "commit"), "1" * 40, "was changed"),
        (("policy", "rev"), "x", "policy.rev is not a known key"),
        (("sha256",), "00", "was changed"),
        (("measures", "over_refusal"), None, "over_refusal"),
        (("format",), 3, "format"),
    ],
)
def test_tampering_is_noticed(
    make_card: Callable[..., RiskCard], tmp_path: Path, path: tuple[str, ...], value: object, expected: str
) -> None:
    """A changed revision, count, value or checksum, an unknown key or a lost measure refuses the file."""
    file = tmp_path / "card.json"
    save_card(make_card(), file)
    content = place = json.loads(file.read_text())
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(content))
    with pytest.raises(RiskCardError, match=expected):
        load_card(file)


def test_card_of_another_revision_is_refused(make_card: Callable[..., RiskCard], tmp_path: Path) -> None:
    """Asked for with a revision, a card of any other is refused with both named."""
    save_card(make_card(), tmp_path / "card.json")
    with pytest.raises(RiskCardError, match=r"abababababab….*compiles to cccccccccccc"):
        load_card(tmp_path / "card.json", revision="cc" * 32)


def test_every_measure_and_baseline_is_accounted_for(make_card: Callable[..., RiskCard]) -> None:
    """A card that leaves out a measure or a baseline is not a card: absence needs a reason."""
    with pytest.raises(ValidationError, match="measures lacks over_refusal"):
        make_card(measures={name: absent("-") for name in MEASURES if name != "over_refusal"})
    with pytest.raises(ValidationError, match="baselines lacks block"):
        make_card(baselines={kind: Baseline(absent="-") for kind in BASELINES if kind != "block"})
    with pytest.raises(ValidationError, match="'absent'"):
        Measure(value=0.5)
    with pytest.raises(ValidationError, match="outside"):
        Measure(value=0.9, n=3, interval=Interval(low=0.1, high=0.2, method="given"))


def test_both_forms_show_every_number_and_escape_text(make_card: Callable[..., RiskCard]) -> None:
    """Markdown and HTML carry values, bounds, verdict, hashes and reasons, and no raw markup of a note."""
    card = make_card()
    for text in (card_markdown(card), card_html(card)):
        for part in ("2.0 %", "3.9 %", "97.0 %", "pass", "cd" * 32, "ab" * 32, "not asked for", "block"):
            assert part in text
        assert "<nothing>" not in text


def test_page_is_self_contained_and_well_formed(make_card: Callable[..., RiskCard]) -> None:
    """The HTML has no script, link or image, and a chart with one bar for each share that was measured."""
    page = card_html(make_card())
    assert not any(part in page for part in ("<script", "<link", "<img", "src=", "@import", "url("))
    chart = page[page.index("<svg") : page.index("</svg>") + 6]
    root = ElementTree.fromstring(chart)  # noqa: S314  # our own text
    assert len(root.findall("{http://www.w3.org/2000/svg}rect")) == 2


def test_comparison_stands_side_by_side_and_warns(make_card: Callable[..., RiskCard]) -> None:
    """Two cards make two columns; different suites are pointed out first."""
    one = make_card()
    other = one.model_copy(
        update={
            "record": one.record.model_copy(update={"suite_sha256": "aa" * 32}),
            "criteria": SuccessCriteria(),
        }
    )
    text = comparison_markdown([one, other])
    assert text.startswith("Different suites")
    assert ["verdict", "pass", "no criteria"] in [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
    ]
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1
    assert not comparison_markdown([one, one]).startswith("Different")


def mechctl(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["mechctl", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


def test_commands_show_and_compare(
    make_card: Callable[..., RiskCard],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`report` prints or writes a card, `eval --compare` prints two, and a fault is one line."""
    card = tmp_path / "card.json"
    save_card(make_card(), card)
    assert mechctl(monkeypatch, "report", card) == 0
    assert capsys.readouterr().out.startswith("# Risk Card: guard@abababababab")
    assert mechctl(monkeypatch, "report", card, "--format", "html", "-o", tmp_path / "card.html") == 0
    assert (tmp_path / "card.html").read_text().startswith("<!doctype html>")
    capsys.readouterr()
    assert mechctl(monkeypatch, "report", card, "-o", card / "below" / "a.md") == 2
    assert "--output" in capsys.readouterr().err
    assert mechctl(monkeypatch, "eval", "--compare", card, card) == 0
    assert "97.0 %" in capsys.readouterr().out
    assert mechctl(monkeypatch, "report", tmp_path / "gone.json") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_criterion_is_judged_by_the_bound_that_hurts(make_card: Callable[..., RiskCard]) -> None:
    """Each field of `success_criteria` has a measure; a minimum needs the lower end, a maximum the upper."""
    assert set(CRITERIA) == set(SuccessCriteria.model_fields)
    measure = Measure(value=0.5, n=9, interval=Interval(low=0.4, high=0.6, method="given"))
    judged = {name for names in CRITERIA.values() for name in names}
    card = make_card()
    card = card.model_copy(update={"measures": card.measures | dict.fromkeys(judged, measure)})
    for name in CRITERIA.keys() - BY_SOURCE:
        met, missed = (0.4, 0.45) if name.endswith("_min") else (0.6, 0.55)
        assert verdict(card, SuccessCriteria(**{name: met})).passed, name
        assert verdict(card, SuccessCriteria(**{name: missed})).status == "fail", name


def by_source(card: RiskCard, name: MeasureName, *sources: tuple[str, int, int]) -> RiskCard:
    """The card with a measure of (source, prompts, new failures)."""
    data = [
        Source(
            name=source, sha256="ab" * 32, n=n, pairs=Pairs(both=0, only_off=0, only_on=bad, neither=n - bad)
        )
        for source, n, bad in sources
    ]
    failed, asked = sum(bad for _, _, bad in sources), sum(n for _, n, _ in sources)
    whole = new_failures(Pairs(both=0, only_off=0, only_on=failed, neither=asked - failed), data=data)
    return card.model_copy(update={"measures": {**card.measures, name: whole}})


@pytest.mark.parametrize("name", sorted(BY_SOURCE))
def test_worst_source_fails_a_card_that_passes_on_average(
    make_card: Callable[..., RiskCard], name: str
) -> None:
    """2,000 easy prompts hide 12 refusals of 120 in one source from the mean, and not from this criterion,
    which names it. Sources of 99 prompts decide nothing and are listed; with no other, the criterion fails.
    """
    measure, whole = CRITERIA[name][0], {name.removeprefix("source_"): 0.02}
    card = by_source(make_card(), measure, ("easy", 2000, 0), ("hard", 120, 12), ("few", 99, 0))
    assert verdict(card, SuccessCriteria(**whole)).passed
    (finding,) = verdict(card, SuccessCriteria(**{name: 0.05})).findings
    assert not finding.passed
    assert finding.bound == pytest.approx(clopper_pearson(12, 120)[1])
    assert finding.line().endswith(
        "; worst of 2 sources: hard, n 120; too few prompts to be judged: few (99)"
    )
    assert verdict(card, SuccessCriteria(**{name: 0.2})).passed
    few = by_source(make_card(), measure, ("few", 99, 0))
    (finding,) = verdict(few, SuccessCriteria(**{name: 0.9})).findings
    assert not finding.passed
    assert f"fails, as {measure} has no source of 100 prompts" in finding.line()


def test_limit_of_the_worst_source_is_not_drawn_at_the_bar_of_all(make_card: Callable[..., RiskCard]) -> None:
    """The chart's dashed line is the limit of the measure that the bar shows."""
    card = by_source(make_card(), "collateral_damage", ("hard", 120, 12))
    plain = card_html(card.model_copy(update={"criteria": SuccessCriteria()}))
    drawn = card_html(card.model_copy(update={"criteria": SuccessCriteria(source_collateral_damage_max=0.3)}))
    assert plain.count("stroke-dasharray") == drawn.count("stroke-dasharray") == 0
    assert "worst of 1 source: hard" in drawn


def measured_tasks(card: RiskCard, only_off: int, bleu_high: float) -> RiskCard:
    """The card with 100 tasks that were right, some of them lost, and a BLEU loss around 1 %."""
    exact = exact_match_loss(Pairs(both=100 - only_off, only_off=only_off, only_on=0, neither=0))
    bleu = Measure(value=0.01, n=100, interval=Interval(low=0.0, high=bleu_high, method="bootstrap"))
    return card.model_copy(
        update={"measures": {**card.measures, "exact_match_loss": exact, "bleu_loss": bleu}}
    )


def test_promised_benign_loss_is_held_against_three_bounds(make_card: Callable[..., RiskCard]) -> None:
    """`constraints.max_benign_loss_pct` fails by harm, lost matches or lost BLEU, and by one not measured."""
    policy = Policy.model_validate(
        {
            "meta": {"id": "guard"},
            "constraints": {"max_benign_loss_pct": 5},
            "interventions": [{"type": "head_scale", "selector": {"layer": 0, "heads": [0]}, "scale": 0.5}],
        }
    )
    assert policy.criteria == SuccessCriteria(benign_loss_max=0.05)
    card = make_card()
    unmeasured = verdict(card, policy.criteria)
    assert [finding.passed for finding in unmeasured.findings] == [True, False, False]
    assert "add a suite with a source of role task" in unmeasured.findings[1].line()
    assert verdict(measured_tasks(card, 0, 0.04), policy.criteria).passed
    assert not verdict(measured_tasks(card, 0, 0.06), policy.criteria).passed
    lost = verdict(measured_tasks(card, 2, 0.04), policy.criteria)
    assert [finding.passed for finding in lost.findings] == [True, False, True]
    assert "benign_loss_max: fails by exact_match_loss, upper 95 % bound 7.04%" in lost.findings[1].line()
    harmed = card.model_copy(update={"measures": {**card.measures, "collateral_damage": rate(30, 400)}})
    assert not verdict(measured_tasks(harmed, 0, 0.04), policy.criteria).findings[0].passed
    both = policy.model_copy(
        update={"evaluation": Evaluation(success_criteria=SuccessCriteria(benign_loss_max=0.02))}
    )
    assert both.criteria.benign_loss_max == 0.02
    assert load_policy(REFERENCE_POLICY).criteria.benign_loss_max == 0.05


def test_promise_alone_gates_a_revision(make_card: Callable[..., RiskCard], tmp_path: Path) -> None:
    """A policy that only promises a benign loss still needs a card, and one that keeps the promise passes."""
    (tmp_path / "cards").mkdir()
    criteria = SuccessCriteria(benign_loss_max=0.05)
    save_card(measured_tasks(make_card(), 0, 0.04), tmp_path / "cards" / "guard.json")
    assert standing("guard", "ab" * 32, tmp_path, criteria).passed
    save_card(make_card(), tmp_path / "cards" / "guard.json")
    assert "bleu_loss was not measured" in standing("guard", "ab" * 32, tmp_path, criteria).reason


FIRST_LAYOUT = Path(__file__).resolve().parents[2] / "fixtures" / "card-format-1.json"


def test_card_of_the_first_layout_still_loads(tmp_path: Path) -> None:
    """What it meant by CCS, CS and LCO is absent now, and says why; other numbers stay; edits are noticed."""
    raw = json.loads(FIRST_LAYOUT.read_text())
    assert raw["measures"]["latency_cost_overhead"]["value"] is not None
    card = load_card(FIRST_LAYOUT)
    for name in ("causal_contribution", "circuit_stability", "latency_cost_overhead", "bleu_loss"):
        assert "measure the policy anew" in str(card.measures[name].absent)
    assert card.measures["defense_efficacy"].value == raw["measures"]["defense_efficacy"]["value"]
    assert (card.latency, card.contributions) == (None, ())
    assert "make bench" not in " ".join(card.notes)
    assert "absent: " in card_html(card)
    save_card(card, tmp_path / "again.json")
    assert load_card(tmp_path / "again.json") == card
    raw["measures"]["latency_cost_overhead"]["value"] = 0.0
    (tmp_path / "edited.json").write_text(json.dumps(raw))
    with pytest.raises(RiskCardError, match="was changed after it was made"):
        load_card(tmp_path / "edited.json")


def test_sections_and_measures_must_agree(make_card: Callable[..., RiskCard]) -> None:
    """CCS is the mean of the parts, LCO has times, CS a circuit: a card that says otherwise is refused."""
    interval = Interval(low=0.0, high=1.0, method="bootstrap")
    parts = tuple(
        Contribution(part=name, share=share, interval=interval) for name, share in (("a", 1), ("b", 0))
    )
    times = Timing(lower_s=1, median_s=2, upper_s=3)
    latency = Latency(requests=8, tokens=32, rounds=5, off=times, on=times, machine="one")
    card = make_card()

    def changed(name: str, value: float, n: int, **fields: Any) -> RiskCard:
        measure = Measure(value=value, n=n, interval=interval)
        return make_card(measures={**card.measures, name: measure}, **fields)

    assert changed("causal_contribution", 0.5, 2, contributions=parts).contributions == parts
    with pytest.raises(ValidationError, match=r"have the mean 0\.5"):
        changed("causal_contribution", 0.6, 2, contributions=parts)
    with pytest.raises(ValidationError, match="contributions has 0 parts"):
        changed("causal_contribution", 0.5, 2)
    assert changed("latency_cost_overhead", 0.1, 5, latency=latency).latency == latency
    with pytest.raises(ValidationError, match="must be given together"):
        changed("latency_cost_overhead", 0.1, 6, latency=latency)
    with pytest.raises(ValidationError, match="circuit is absent"):
        changed("circuit_stability", 0.5, 3)


def test_both_forms_show_parts_and_their_circuit(make_card: Callable[..., RiskCard]) -> None:
    """The weightiest parts stand first, the rest in one row, and the circuit beside the revision."""
    interval = Interval(low=-1.0, high=1.0, method="bootstrap")
    parts = tuple(
        Contribution(part=f"row {number} of own", share=number / 100, interval=interval)
        for number in range(30)
    )
    measure = Measure(value=sum(part.share for part in parts) / 30, n=30, interval=interval)
    card = make_card(
        measures={**make_card().measures, "causal_contribution": measure},
        contributions=parts,
        circuit=CircuitReference(name="walk.json", sha256="ee" * 32),
    )
    for text in (card_markdown(card), card_html(card)):
        assert text.index("row 29 of own") < text.index("row 6 of own")
        assert "row 5 of own" not in text
        assert "6 more, each" in text
        assert "walk.json, sha256 " + "ee" * 32 in text


def test_standing_takes_the_card_of_exactly_this_revision(
    make_card: Callable[..., RiskCard], tmp_path: Path
) -> None:
    """Right revision and criteria pass; another revision, an edited card, none at all: no card, and why."""
    criteria, card = SuccessCriteria(defense_efficacy_min=0.9), make_card()
    path = tmp_path / "cards" / "guard.json"
    missing = standing("guard", "ab" * 32, tmp_path, criteria)
    assert (missing.card, missing.passed) == (None, False)
    assert "there is no Risk Card" in missing.reason
    path.parent.mkdir()
    save_card(card, path)
    found = standing("guard", "ab" * 32, tmp_path, criteria)
    assert found.passed
    assert found.card == card
    raised = standing("guard", "ab" * 32, tmp_path, SuccessCriteria(defense_efficacy_min=0.99))
    assert not raised.passed
    assert "defense_efficacy_min: fails" in raised.reason
    assert "but the policy compiles to" in standing("guard", "cd" * 32, tmp_path, criteria).reason
    path.write_text(path.read_text().replace('"successes": 8', '"successes": 7'))
    assert standing("guard", "ab" * 32, tmp_path, criteria).card is None


def test_reading_a_card_loads_no_torch(make_card: Callable[..., RiskCard], tmp_path: Path) -> None:
    """The gateway can ask for a card without torch, vllm or transformers."""
    (tmp_path / "cards").mkdir()
    save_card(make_card(), tmp_path / "cards" / "guard.json")
    program = (
        "import sys, pathlib; from interpretops.policy import SuccessCriteria\n"
        "from interpretops.riskcard import standing\n"
        f"found = standing('guard', {'ab' * 32!r}, pathlib.Path({str(tmp_path)!r}), SuccessCriteria())\n"
        "assert found.card is not None\n"
        "assert not {'torch', 'vllm', 'transformers', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_folder_of_cards_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision is not proven then, and whoever asks gets the reason instead of an error."""

    def refuse(*_: object) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_file", refuse)
    found = standing("calm", "ab" * 32, tmp_path, SuccessCriteria())
    assert not found.passed
    assert "Permission denied" in found.reason
