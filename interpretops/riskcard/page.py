"""A Risk Card as one HTML file without scripts or links, with its intervals drawn as SVG."""

from html import escape

from interpretops.riskcard.card import MEASURES, NATS, MeasureName, RiskCard
from interpretops.riskcard.table import (
    Table,
    baseline_notes_table,
    baselines_table,
    contributions_table,
    latency_table,
    measures_table,
    number,
    record_table,
    sources_table,
)
from interpretops.riskcard.verdict import BY_SOURCE, Verdict, verdict

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1c2733; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { border: 1px solid #ccd5de; padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { background: #f1f4f7; }
td { overflow-wrap: anywhere; } td.short { white-space: nowrap; }
.pass { color: #14693a; } .fail { color: #a3231f; } .none { color: #66707a; }
"""
SHORT = 22
_LEFT, _WIDTH, _ROW = 90, 520, 28


def card_html(card: RiskCard) -> str:
    """The whole card as a self-contained document."""
    found = verdict(card)
    title = escape(f"Risk Card: {card.policy.id}@{card.policy.revision[:12]}")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>",
        _verdict(found),
        _chart(card, found),
        *(
            _table(table)
            for table in (
                measures_table(card),
                latency_table(card),
                contributions_table(card),
                baselines_table(card),
                baseline_notes_table(card),
                sources_table(card),
                record_table(card),
            )
            if table.rows
        ),
    ]
    if card.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in card.notes)
        parts.append(f"<h2>Notes</h2><ul>{notes}</ul>")
    return "\n".join(parts) + "\n</body></html>\n"


def _verdict(found: Verdict) -> str:
    kind = "none" if found.status == "no criteria" else found.status
    lines = "".join(
        f'<li class="{"pass" if item.passed else "fail"}">{escape(item.line())}</li>'
        for item in found.findings
    )
    return f'<p>Verdict: <strong class="{kind}">{found.status}</strong></p><ul>{lines}</ul>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.heads)
    rows = "".join(
        "<tr>" + "".join(f"<td{_short(cell)}>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    return f"<h2>{table.title}</h2><table><tr>{head}</tr>{rows}</table>"


def _short(cell: str) -> str:
    """CSS class: names and numbers stay on one line; sentences and hashes may wrap."""
    return ' class="short"' if len(cell) <= SHORT else ""


def _chart(card: RiskCard, found: Verdict) -> str:
    """A bar from 0 to each share, with its interval as whiskers and the criterion as a dashed line."""
    demanded: dict[MeasureName, float] = {}
    of_whole = [finding for finding in found.findings if finding.criterion not in BY_SOURCE]
    for finding in of_whole:  # of two that hold for one measure, both maxima, the lower
        demanded[finding.measure] = min(finding.demanded, demanded.get(finding.measure, finding.demanded))
    shown = [name for name in MEASURES if name not in NATS and card.measures[name].value is not None]
    if not shown:
        return ""
    height = _ROW * len(shown) + 30
    bars = "".join(_bar(card, name, row, demanded.get(name)) for row, name in enumerate(shown))
    ticks = "".join(
        f'<text x="{_x(tick / 4):.1f}" y="{height - 8}" font-size="11" text-anchor="middle">'
        f"{25 * tick} %</text>"
        for tick in range(5)
    )
    total = _LEFT + _WIDTH + 130
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" width="{total}" '
        f'role="img" aria-label="Measures with their 95 % intervals">{bars}{ticks}</svg>'
    )


def _x(share: float) -> float:
    return _LEFT + _WIDTH * min(max(share, 0.0), 1.0)


def _bar(card: RiskCard, name: MeasureName, row: int, demanded: float | None) -> str:
    measure = card.measures[name]
    assert measure.value is not None
    assert measure.interval is not None
    top, middle = row * _ROW + 6, row * _ROW + 14
    low, high, point = (_x(v) for v in (measure.interval.low, measure.interval.high, measure.value))
    whiskers = f"M{low:.1f},{middle - 5}v10M{low:.1f},{middle}H{high:.1f}M{high:.1f},{middle - 5}v10"
    line = ""
    if demanded is not None:
        at = _x(demanded)
        line = f'<path d="M{at:.1f},{top - 4}v24" stroke="#a3231f" stroke-dasharray="3 2"/>'
    return (
        f'<text x="{_LEFT - 8}" y="{middle + 4}" font-size="12" text-anchor="end">{escape(MEASURES[name][0])}'
        f'</text><rect x="{_LEFT}" y="{top}" width="{point - _LEFT:.1f}" height="16" fill="#8fb3d9"/>'
        f'<path d="{whiskers}" stroke="#1c2733" fill="none"/>{line}'
        f'<text x="{_LEFT + _WIDTH + 8}" y="{middle + 4}" font-size="12">{number(name, measure.value)}</text>'
    )
