"""The tables of a card as plain rows, shared by all output formats."""

from collections.abc import Sequence
from dataclasses import dataclass

from interpretops.riskcard.card import BASELINES, MEASURES, NATS, Measure, MeasureName, RiskCard, Source

MOST_PARTS = 24
"""Rows of the table of a policy's parts; the file holds all of them."""
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
    """A value in the measure's unit."""
    return f"{value:+.4f}" if name in NATS else f"{value:.1%}".replace("%", " %")


def with_interval(name: MeasureName, measure: Measure | None) -> str:
    """``2.0 % [0.9 %, 3.9 %] n=400``, or that the measure is absent."""
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
    """The counts of each measure, by source file."""
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
    """The policy and every baseline side by side, with the measures that any baseline has."""
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


def contributions_table(card: RiskCard) -> Table:
    """The effect lost without each part of the policy, largest first."""
    ordered = sorted(card.contributions, key=lambda part: -abs(part.share))
    rows = [
        (
            part.part,
            _share(part.share),
            f"{_share(part.interval.low)} to {_share(part.interval.high)}",
        )
        for part in ordered[:MOST_PARTS]
    ]
    if rest := ordered[MOST_PARTS:]:
        shares = sorted(part.share for part in rest)
        rows.append((f"{len(rest)} more, each", f"{_share(shares[0])} to {_share(shares[-1])}", ""))
    return Table("Parts of the policy", ("without", "effect lost", "95 % interval"), tuple(rows))


def _share(share: float) -> str:
    return number("causal_contribution", share)


def latency_table(card: RiskCard) -> Table:
    """The times behind LCO and what they cost."""
    found = card.latency
    title = "Latency and cost"
    if found is None:
        return Table(title, ("", "without the policy", "with it"), ())
    both = (found.off, found.on)
    costs = [found.cost_per_1000_requests(timing) for timing in both]
    price = "whose price is unknown: runtime.price_per_hour is not set"
    if found.price_per_hour is not None:
        price = f"at ${found.price_per_hour:g} an hour"
    rows = [
        (
            f"a batch of {found.requests} requests of {found.tokens} tokens, median [quartiles] of "
            f"{found.rounds} rounds",
            *(f"{t.median_s:.3f} s [{t.lower_s:.3f}, {t.upper_s:.3f}]" for t in both),
        ),
        ("per generated token", *(f"{1000 * found.seconds_per_token(t):.3f} ms" for t in both)),
        (
            f"1,000 such requests on a machine {price}",
            *("absent" if cost is None else f"${cost:.4f}" for cost in costs),
        ),
        ("machine", found.machine, found.machine),
    ]
    return Table(title, ("", "without the policy", "with it"), tuple(rows))


def _there(measure: Measure | None) -> bool:
    return measure is not None and measure.value is not None


def record_table(card: RiskCard) -> Table:
    """How to repeat the measurement."""
    record = card.record
    rows = [
        ("policy", f"{card.policy.id}, against {card.policy.target_class}"),
        ("revision", card.policy.revision),
        ("circuit", _circuit(card)),
        ("model", card.model.name),
        ("fingerprint", card.model.fingerprint),
        ("command", record.command),
        ("suite", f"{record.suite}, sha256 {record.suite_sha256}"),
        ("measured on", record.measured_on or ""),
        ("commit", record.commit),
        ("machine", record.machine),
        ("versions", _pairs(record.versions)),
        ("judges", _pairs(record.judges)),
        ("settings", _pairs(record.settings)),
    ]
    return Table("How to repeat it", ("what", "value"), tuple((head, value) for head, value in rows if value))


def _circuit(card: RiskCard) -> str:
    found = card.circuit
    if found.name is None:
        return f"absent: {found.absent}"
    return f"{found.name}{f' ({found.id})' if found.id else ''}, sha256 {found.sha256}"


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
