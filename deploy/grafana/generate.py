"""Generates the gateway's Grafana dashboard; `make docs` writes it to interpretops.json in this folder.

A panel has a title, a unit and queries; everything else is the same for all panels. Grafana's Python SDK
would have to match each Grafana release, for the forty keys used here.
"""

import json
import sys
from dataclasses import dataclass
from typing import Any

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
RATE = "[$__rate_interval]"
WIDTH, HEIGHT, ACROSS = 8, 8, 3


@dataclass(frozen=True)
class Panel:
    """One panel: title, unit, and queries with their legends."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    about: str = ""
    kind: str = "timeseries"


def _quantiles(metric: str, by: str = "") -> tuple[tuple[str, str], ...]:
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        (f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{RATE})))", f"p{q * 100:g}{legend}")
        for q in (0.5, 0.95, 0.99)
    )


def _rate(metric: str, by: str) -> tuple[tuple[str, str], ...]:
    return ((f"sum by ({by}) (rate({metric}{RATE}))", f"{{{{{by}}}}}"),)


ROWS: dict[str, tuple[Panel, ...]] = {
    "Is it guarding?": (
        Panel("Ready", "bool_yes_no", (("interpretops_ready", "{{instance}}"),), kind="stat"),
        Panel(
            "Why requests are refused",
            "bool_yes_no",
            (("max by (reason) (interpretops_not_ready)", "{{reason}}"),),
            "The reasons why /readyz reports not ready.",
            "stat",
        ),
        Panel(
            "Answers withheld without proof",
            "short",
            (("sum by (policy) (increase(interpretops_receipts_failed_total[1h]))", "{{policy}}"),),
            "In the last hour. More than a few around an engine restart need attention.",
            "stat",
        ),
        Panel(
            "Active policies",
            "short",
            (("interpretops_policy_info", "{{policy}} @ {{revision}}"),),
            "Policies and their active revisions.",
            "stat",
        ),
        Panel(
            "Policies without a passing Risk Card",
            "short",
            (("interpretops_policy_unproven", "{{policy}}"),),
            kind="stat",
        ),
        Panel(
            "Newest file is not served",
            "short",
            (("interpretops_policy_broken", "{{policy}}"),),
            kind="stat",
        ),
        Panel(
            "Audit log failing", "bool_yes_no", (("interpretops_audit_failing", "{{instance}}"),), kind="stat"
        ),
    ),
    "Policies": (
        Panel(
            "Requests in which the gate opened",
            "percentunit",
            (
                (
                    f"sum by (policy) (rate(interpretops_policy_requests_gated_total{RATE}))"
                    f" / sum by (policy) (rate(interpretops_requests_total{{policy!='none'}}{RATE}))",
                    "{{policy}}",
                ),
            ),
            "Share of a policy's requests. A jump means an attack, or a policy that fires too often.",
        ),
        Panel("Tokens evaluated", "short", _rate("interpretops_policy_tokens_evaluated_total", "policy")),
        Panel("Edits applied", "short", _rate("interpretops_policy_edits_applied_total", "policy")),
        Panel(
            "Shadow results",
            "short",
            (
                (
                    f"sum by (policy, result) (rate(interpretops_shadow_requests_total{RATE}))",
                    "{{policy}} {{result}}",
                ),
            ),
        ),
        Panel(
            "Drift (PSI)",
            "short",
            (("interpretops_policy_drift_psi", "{{policy}}"),),
            "Distance of firing from the pinned baseline: below 0.1 stable, above 0.25 an alert.",
        ),
        Panel(
            "Drift: requests per window",
            "short",
            (("interpretops_policy_drift_requests", "{{policy}} {{window}}"),),
        ),
        Panel(
            "Reloads",
            "short",
            (("sum by (result) (increase(interpretops_policy_reloads_total[5m]))", "{{result}}"),),
        ),
    ),
    "Canary": (
        *(
            Panel(
                title,
                "percentunit",
                ((f"interpretops_canary_measure{{measure='{measure}'}}", "{{policy}} {{bound}}"),),
                about,
            )
            for title, measure, about in (
                (
                    "Defense efficacy",
                    "defense_efficacy",
                    "Share of the canary's attacks that a policy stops.",
                ),
                (
                    "Collateral damage",
                    "collateral_damage",
                    "Share of the canary's benign prompts that a policy harms.",
                ),
                (
                    "Latency overhead",
                    "latency_overhead",
                    "Latency of steered over unsteered answers of equal length.",
                ),
            )
        ),
        Panel("Canary sample size", "short", (("interpretops_canary_n", "{{policy}} {{measure}}"),)),
        Panel(
            "Canary limits exceeded",
            "short",
            (("interpretops_canary_breach", "{{policy}} {{measure}}"),),
            "By the whole confidence interval.",
            "stat",
        ),
        Panel("Canary pairs", "short", _rate("interpretops_canary_pairs_total", "result")),
    ),
    "Traffic": (
        Panel("Requests by status", "reqps", _rate("interpretops_requests_total", "status")),
        Panel("Requests by policy", "reqps", _rate("interpretops_requests_total", "policy")),
        Panel("Requests by tenant", "reqps", _rate("interpretops_requests_total", "tenant")),
        Panel("Refusals by reason", "reqps", _rate("interpretops_refusals_total", "reason")),
        Panel("Tokens by tenant", "short", _rate("interpretops_tenant_tokens_total", "tenant")),
        Panel("Requests in progress", "short", (("interpretops_requests_in_flight", "{{instance}}"),)),
    ),
    "Latency": (
        Panel("Time to first token", "s", _quantiles("interpretops_time_to_first_token_seconds", "policy")),
        Panel("Inter-token latency", "s", _quantiles("interpretops_inter_token_latency_seconds", "policy")),
        Panel("Request duration", "s", _quantiles("interpretops_request_seconds", "policy")),
        Panel(
            "Gateway overhead",
            "s",
            _quantiles("interpretops_gateway_overhead_seconds"),
            "Before and after the engine: authentication, binding, relaying, audit.",
        ),
    ),
    "Engine and clients": (
        Panel(
            "Engine responds",
            "bool_yes_no",
            (("interpretops_engine_up", "{{instance}} {{engine}}"),),
            kind="stat",
        ),
        Panel(
            "Engine is proven to steer",
            "bool_yes_no",
            (("interpretops_engine_ready", "{{instance}} {{engine}}"),),
            kind="stat",
        ),
        Panel(
            "Outstanding requests",
            "short",
            (("interpretops_engine_outstanding", "{{instance}} {{engine}}"),),
            "The next request goes to the engine with the fewest.",
        ),
        Panel(
            "Engine skipped by its breaker",
            "bool_yes_no",
            (("interpretops_engine_breaker_open", "{{instance}} {{engine}}"),),
            "Several requests in a row failed there.",
            "stat",
        ),
        Panel(
            "Requests moved to another engine", "reqps", _rate("interpretops_engine_retries_total", "reason")
        ),
        Panel(
            "Revisions not attested",
            "short",
            (("increase(interpretops_engine_unattested_total[1h])", "{{instance}} {{engine}}"),),
            "In the last hour, while other engines attested them.",
            "stat",
        ),
        Panel(
            "Redis unreachable", "bool_yes_no", (("interpretops_limits_away", "{{instance}}"),), kind="stat"
        ),
        Panel(
            "Engines started",
            "short",
            (("increase(interpretops_engine_starts_total[1h])", "{{instance}}"),),
            "In the last hour.",
            "stat",
        ),
        Panel("Client disconnects", "reqps", _rate("interpretops_clients_gone_total", "route")),
        Panel("Stalled connections closed", "reqps", _rate("interpretops_connections_cut_total", "reason")),
        Panel(
            "Transcripts",
            "short",
            _rate("interpretops_transcripts_total", "result"),
            "Of tenants that opted in.",
        ),
        Panel(
            "Expired transcripts not deleted",
            "bool_yes_no",
            (("interpretops_transcripts_overdue", "{{instance}}"),),
            kind="stat",
        ),
        Panel("Audit records", "short", _rate("interpretops_audit_records_total", "instance")),
    ),
}


def dashboard() -> dict[str, Any]:
    """The dashboard in Grafana's import format (schema 39, Grafana 10.4 and later)."""
    panels: list[dict[str, Any]] = []
    top = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": top, "w": WIDTH * ACROSS, "h": 1}
        panels.append(
            {
                "type": "row",
                "title": title,
                "gridPos": place,
                "id": len(panels) + 1,
                "collapsed": False,
                "panels": [],
            }
        )
        top += 1
        for index, panel in enumerate(row):
            x, y = index % ACROSS, index // ACROSS
            place = {"x": WIDTH * x, "y": top + HEIGHT * y, "w": WIDTH, "h": HEIGHT}
            panels.append(_panel(panel, len(panels) + 1, place))
        top += HEIGHT * (1 + (len(row) - 1) // ACROSS)
    return {
        "title": "InterpretOps gateway",
        "uid": "interpretops-gateway",
        "tags": ["interpretops"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
            ]
        },
        "panels": panels,
    }


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    targets = [
        {
            "refId": chr(ord("A") + index),
            "expr": query,
            "legendFormat": legend,
            "datasource": DATASOURCE,
            "instant": panel.kind == "stat",
        }
        for index, (query, legend) in enumerate(panel.queries)
    ]
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": DATASOURCE,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {},
        "targets": targets,
    }


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=1)
    sys.stdout.write("\n")
