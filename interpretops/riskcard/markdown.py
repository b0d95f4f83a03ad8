"""A Risk Card as Markdown, and tables as Markdown."""

from collections.abc import Sequence

from interpretops.riskcard.card import RiskCard
from interpretops.riskcard.table import (
    Table,
    baseline_notes_table,
    baselines_table,
    comparison_table,
    contributions_table,
    latency_table,
    measures_table,
    record_table,
    sources_table,
)
from interpretops.riskcard.verdict import verdict


def card_markdown(card: RiskCard) -> str:
    """The whole card."""
    found = verdict(card)
    lines = [f"# Risk Card: {card.policy.id}@{card.policy.revision[:12]}", "", f"Verdict: **{found.status}**"]
    lines += ["", *(f"- {_plain(finding.line())}" for finding in found.findings)]
    for make in (
        measures_table,
        latency_table,
        contributions_table,
        baselines_table,
        baseline_notes_table,
        sources_table,
        record_table,
    ):
        table = make(card)
        if table.rows:
            lines += ["", f"## {table.title}", "", *_rows(table)]
    if card.notes:
        lines += ["", "## Notes", "", *(f"- {_plain(note)}" for note in card.notes)]
    return "\n".join(lines) + "\n"


def comparison_markdown(cards: Sequence[RiskCard]) -> str:
    """Cards side by side with their verdicts last; preceded by a warning if they are not comparable.

    Columns are padded, so that the table is readable in a terminal.
    """
    table = comparison_table(cards)
    verdicts = ("verdict", *(verdict(card).status for card in cards))
    lines = _rows(Table(table.title, table.heads, (*table.rows, verdicts)), aligned=True)
    for what, values in (
        ("suites", {card.record.suite_sha256 for card in cards}),
        ("models", {card.model.fingerprint for card in cards}),
    ):
        if len(values) > 1:
            lines = [f"Different {what}: the numbers are not of the same thing.", "", *lines]
    return "\n".join(lines) + "\n"


def _rows(table: Table, *, aligned: bool = False) -> list[str]:
    rows = [[_plain(cell) for cell in row] for row in (table.heads, *table.rows)]
    widths = [max(3, *(len(row[place]) for row in rows)) if aligned else 3 for place in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width * aligned) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


def _plain(text: str) -> str:
    """Text that cannot end a cell or begin markup."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("<", "&lt;")
    for sign in "|`*_[]":
        text = text.replace(sign, f"\\{sign}")
    return text
