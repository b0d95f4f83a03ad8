"""The tables of a card as plain rows, which every form of the card shows alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from interpretops.riskcard.card import BASELINES, MEASURES, NATS, Measure, MeasureName, RiskCard, Source

METHODS = {
    "clopper_pearson": "Clopper-Pearson",
    "paired_bootstrap": "paired bootstrap",
    "bootstrap": "bootstrap",
    "hoeffding": "Hoeffding",
    "notch": "notch of the quartiles",
    "given": "as given",
}


@dataclass(frozen=True)
class Table:
    """A title, column heads and rows of text."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def number(name: MeasureName, value: float) -> str:
    """A value in the measure's own unit."""
    return f"{value:+.4f}" if name in NATS else f"{value:.1%}".replace("%", " %")


def with_interval(name: MeasureName, measure: Measure | None) -> str:
    """``2.0 % [0.9 %, 3.9 %] n=400``, or that there is none."""
    if measure is None:
        return "-"
    if measure.value is None or measure.interval is None:
        return "absent"
    low, high = number(name, measure.interval.low), number(name, measure.interval.high)
    return f"{number(name, measure.value)} [{low}, {high}] n={measure.n}"


def measures_table(card: RiskCard) -> Table:
    """Every measure with interval, counts and method; an absent one with its reason."""
    rows = []
    for name, (short, meaning) in MEASURES.items():
        measure = card.measures[name]
        if measure.value is None or measure.interval is None:
            rows.append((short, "absent", "", "", "", f"{meaning}. Absent: {measure.absent}"))
            continue
        interval = f"{number(name, measure.interval.low)} to {number(name, measure.interval.high)}"
        counts = f"{measure.n}" if measure.successes is None else f"{measure.successes} of {measure.n}"
        method = METHODS[measure.interval.method]
        rows.append((short, number(name, measure.value), interval, counts, method, meaning))
    return Table(
        "Measures", ("measure", "value", "95 % interval", "n", "interval by", "meaning"), tuple(rows)
    )


def sources_table(card: RiskCard) -> Table:
    """The counts of each measure by the file they come from."""
    rows = [
        (
            MEASURES[name][0],
            source.name,
            f"{source.n}",
            _events(source),
            source.sha256,
        )
        for name in MEASURES
        for source in card.measures[name].data
    ]
    return Table("Data", ("measure", "source", "n", "events", "sha256"), tuple(rows))


def _events(source: Source) -> str:
    """What was counted in one file: attacks that succeed for DE, failed answers for CD and over-refusal."""
    if source.pairs is not None:
        off, on = source.pairs.both + source.pairs.only_off, source.pairs.both + source.pairs.only_on
        return f"{off} without the policy, {on} with it"
    return "" if source.successes is None else f"{source.successes}"


def baselines_table(card: RiskCard) -> Table:
    """The policy and every baseline side by side, by the measures that any baseline has."""
    measured = {kind: base for kind, base in card.baselines.items() if base.absent is None}
    shown = [
        name
        for name in MEASURES
        if any(_there(baseline.measures.get(name)) for baseline in measured.values())
    ]
    kinds = [kind for kind in BASELINES if kind in measured]
    rows = [
        (
            MEASURES[name][0],
            with_interval(name, card.measures[name]),
            *(with_interval(name, measured[kind].measures.get(name)) for kind in kinds),
        )
        for name in shown
    ]
    return Table("Baselines", ("", "this policy", *(BASELINES[kind] for kind in kinds)), tuple(rows))


def baseline_notes_table(card: RiskCard) -> Table:
    """How each baseline was made, or why it is absent."""
    rows = []
    for kind, meaning in BASELINES.items():
        baseline = card.baselines[kind]
        note = baseline.note if baseline.absent is None else f"absent: {baseline.absent}"
        if note:
            rows.append((meaning, note))
    return Table("How the baselines were made", ("baseline", "note"), tuple(rows))


def _there(measure: Measure | None) -> bool:
    return measure is not None and measure.value is not None


def record_table(card: RiskCard) -> Table:
    """How to repeat the measurement."""
    record = card.record
    rows = [
        ("policy", f"{card.policy.id}, against {card.policy.target_class}"),
        ("revision", card.policy.revision),
        ("model", card.model.name),
        ("fingerprint", card.model.fingerprint),
        ("command", record.command),
        ("suite", f"{record.suite}, sha256 {record.suite_sha256}"),
        ("commit", record.commit),
        ("machine", record.machine),
        ("versions", _pairs(record.versions)),
        ("judges", _pairs(record.judges)),
        ("settings", _pairs(record.settings)),
    ]
    return Table("How to repeat it", ("what", "value"), tuple((head, value) for head, value in rows if value))


def _pairs(values: dict[str, str] | dict[str, str | int | float | bool]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def comparison_table(cards: Sequence[RiskCard]) -> Table:
    """Cards side by side, one column each."""
    heads = ("", *(f"{card.policy.id}@{card.policy.revision[:12]}" for card in cards))
    rows = [
        ("model", *(card.model.name for card in cards)),
        ("suite", *(f"{card.record.suite} ({card.record.suite_sha256[:12]})" for card in cards)),
    ]
    rows += [
        (MEASURES[name][0], *(with_interval(name, card.measures[name]) for card in cards))
        for name in MEASURES
        if any(card.measures[name].value is not None for card in cards)
    ]
    rows.append(("answers", *(f"{card.record.settings.get('answers_sha256', '-')}"[:12] for card in cards)))
    cached = "cached_prompt_tokens"
    rows.append(("cached tokens", *(f"{card.record.settings.get(cached, '-')}" for card in cards)))
    return Table("Comparison", heads, tuple(rows))
