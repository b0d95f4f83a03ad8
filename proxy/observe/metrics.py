"""The gateway's Prometheus metrics, each declared once, in their own registry."""

from __future__ import annotations

from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_TTFT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_E2E_BUCKETS_S = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0),
    *(20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
)
_ITL_BUCKETS_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4),
    *(0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_OVERHEAD_BUCKETS_S = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 100e-3, 500e-3)


OUTCOMES: Final = ("answered", "refused", "failed", "client_gone")


class Metrics:
    """All metrics. Label values are bounded: route patterns, policy ids, codes and statuses.

    A series that an alert reads must exist with value 0 before its first event: Prometheus sees no increase
    in a series that starts at 1. So the code that first learns a label value initialises its series.
    """

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "interpretops_requests",
            "Requests answered.",
            ("route", "tenant", "policy", "status"),
            registry=registry,
        )
        self.outcomes = Counter(
            "interpretops_request_outcomes",
            "Requests by outcome; `failed` includes streams that failed after they had started.",
            ("outcome",),
            registry=registry,
        )
        for outcome in OUTCOMES:
            self.outcomes.labels(outcome)
        self.refusals = Counter(
            "interpretops_refusals", "Requests refused, by reason.", ("reason",), registry=registry
        )
        self.receipts_failed = Counter(
            "interpretops_receipts_failed",
            "Answers withheld or cut off because the engine did not prove the required revision.",
            ("policy",),
            registry=registry,
        )
        self.clients_gone = Counter(
            "interpretops_clients_gone", "Requests whose client disconnected.", ("route",), registry=registry
        )
        self.reloads = Counter(
            "interpretops_policy_reloads", "Policy files loaded or rejected.", ("result",), registry=registry
        )
        self.policy_info = Gauge(
            "interpretops_policy_info",
            "Always 1; the labels name each policy's active revision.",
            ("policy", "revision"),
            registry=registry,
        )
        self.shadow_requests = Counter(
            "interpretops_shadow_requests",
            "Requests repeated under a shadow revision, by whether the answer changed.",
            ("policy", "result"),
            registry=registry,
        )
        self.policy_unproven = Gauge(
            "interpretops_policy_unproven",
            "1 while a policy serves without a Risk Card that meets its success criteria.",
            ("policy",),
            registry=registry,
        )
        self.policy_broken = Gauge(
            "interpretops_policy_broken",
            "1 while the newest file of a policy is not the one served.",
            ("policy",),
            registry=registry,
        )
        self.policy_sources_broken = Gauge(
            "interpretops_policy_sources_broken",
            "Policy folders that cannot be read, and broken policy files that belong to no known policy.",
            ("source",),
            registry=registry,
        )
        self.connections_cut = Counter(
            "interpretops_connections_cut",
            "Client connections closed: no complete request arrived, or the answer was not read, in time.",
            ("reason",),
            registry=registry,
        )
        self.tokens = Counter(
            "interpretops_tenant_tokens",
            "Tokens processed by the engine, by tenant.",
            ("tenant",),
            registry=registry,
        )
        self.tokens_evaluated = Counter(
            "interpretops_policy_tokens_evaluated",
            "Tokens at which the engine evaluated a policy's plan.",
            ("policy",),
            registry=registry,
        )
        self.edits_applied = Counter(
            "interpretops_policy_edits_applied",
            "(token, edit site) pairs that a policy changed.",
            ("policy",),
            registry=registry,
        )
        self.gates_fired = Counter(
            "interpretops_policy_gates_fired",
            "(token, gate) pairs at which a conditional gate was open.",
            ("policy",),
            registry=registry,
        )
        self.requests_gated = Counter(
            "interpretops_policy_requests_gated",
            "Requests in which a conditional gate of the policy opened at least once.",
            ("policy",),
            registry=registry,
        )
        self.policy_refusals = Counter(
            "interpretops_policy_refusals",
            "Answers, one per choice, in which a gate of the policy with `refusal: true` was open.",
            ("policy",),
            registry=registry,
        )
        self.transcripts = Counter(
            "interpretops_transcripts",
            "Transcripts of requests, by tenant and result: `stored` or `lost`.",
            ("tenant", "result"),
            registry=registry,
        )
        self.transcripts_overdue = Gauge(
            "interpretops_transcripts_overdue",
            "1 while expired transcripts cannot be deleted.",
            registry=registry,
        )
        self.drift = Gauge(
            "interpretops_policy_drift_psi",
            "How far a policy's firing on live requests is from its pinned baseline (PSI).",
            ("policy",),
            registry=registry,
        )
        self.drift_requests = Gauge(
            "interpretops_policy_drift_requests",
            "Number of requests in the drift windows: `live`, `baseline`.",
            ("policy", "window"),
            registry=registry,
        )
        self.canary_pairs = Counter(
            "interpretops_canary_pairs",
            "Canary prompts asked with and without a policy, by result: `ok` or `failed`.",
            ("policy", "result"),
            registry=registry,
        )
        self.canary_refusals = Counter(
            "interpretops_canary_refusals",
            "Canary answers in which a refusal gate of the policy was open, by prompt: `harmful`, `benign`.",
            ("policy", "prompt"),
            registry=registry,
        )
        self.canary_measure = Gauge(
            "interpretops_canary_measure",
            "Canary measures of the active revision: value, and bounds of the 95 % interval.",
            ("policy", "measure", "bound"),
            registry=registry,
        )
        self.canary_n = Gauge(
            "interpretops_canary_n",
            "Number of prompts behind a canary measure; for latency, number of answer pairs.",
            ("policy", "measure"),
            registry=registry,
        )
        self.canary_breach = Gauge(
            "interpretops_canary_breach",
            "1 while the whole interval of a canary measure is beyond the policy's limit.",
            ("policy", "measure"),
            registry=registry,
        )
        self.audit_failing = Gauge(
            "interpretops_audit_failing", "1 while the audit log cannot be written.", registry=registry
        )
        self.audit_records = Counter(
            "interpretops_audit_records", "Records written to the audit log.", registry=registry
        )
        self.audit_displaced = Counter(
            "interpretops_audit_displaced",
            "Times that another program moved, removed or changed a file of the audit log.",
            ("file",),
            registry=registry,
        )
        self.tls_start = Gauge(
            "interpretops_tls_certificate_start_timestamp_seconds",
            "Start of validity of the certificate chain that a listener uses, in Unix seconds.",
            ("listener",),
            registry=registry,
        )
        self.tls_expiry = Gauge(
            "interpretops_tls_certificate_expiry_timestamp_seconds",
            "Expiry of the certificate chain that a listener uses, in Unix seconds.",
            ("listener",),
            registry=registry,
        )
        self.tls_broken = Gauge(
            "interpretops_tls_certificate_broken",
            "1 while the certificate and key on disk cannot be used, so the previous pair stays in use.",
            ("listener",),
            registry=registry,
        )
        self.keys_broken = Gauge(
            "interpretops_keys_broken",
            "1 while the key file is missing, or is unreadable and the old keys stay in force for a while.",
            registry=registry,
        )
        self.keys_skipped = Gauge(
            "interpretops_keys_skipped",
            "Keys in the key file that are not accepted because their tenant is not declared.",
            registry=registry,
        )
        self.engine_up = Gauge(
            "interpretops_engine_up", "1 while an engine responds.", ("engine",), registry=registry
        )
        self.engine_ready = Gauge(
            "interpretops_engine_ready",
            "1 while an engine is proven to steer and takes requests.",
            ("engine",),
            registry=registry,
        )
        self.engine_outstanding = Gauge(
            "interpretops_engine_outstanding",
            "Requests of this gateway in progress at an engine.",
            ("engine",),
            registry=registry,
        )
        self.engine_breaker_open = Gauge(
            "interpretops_engine_breaker_open",
            "1 while an engine is skipped because several requests in a row failed.",
            ("engine",),
            registry=registry,
        )
        self.engine_retries = Counter(
            "interpretops_engine_retries",
            "Requests moved to another engine before any part of the answer was sent.",
            ("engine", "reason"),
            registry=registry,
        )
        self.engine_unattested = Counter(
            "interpretops_engine_unattested",
            "Revisions that an engine did not attest while others did; it gets no requests of these.",
            ("engine",),
            registry=registry,
        )
        self.limits_away = Gauge(
            "interpretops_limits_away",
            "1 while Redis, which holds the shared limits, is unreachable.",
            registry=registry,
        )
        self.budgets_unsaved = Gauge(
            "interpretops_budgets_unsaved",
            "1 while tenants' budget usage cannot be saved to its file.",
            registry=registry,
        )
        self.engines_unresolved = Gauge(
            "interpretops_engines_unresolved",
            "1 while a DNS name of engine.url cannot be resolved; its last known addresses stay in use.",
            registry=registry,
        )
        self.limits_unanswered = Counter(
            "interpretops_limits_unanswered",
            "Queries to Redis, which holds the shared limits, that failed or timed out.",
            registry=registry,
        )
        self.ready = Gauge(
            "interpretops_ready", "1 while requests can be served, as /readyz reports.", registry=registry
        )
        self.not_ready = Gauge(
            "interpretops_not_ready",
            "1 for each reason why requests cannot be served.",
            ("reason",),
            registry=registry,
        )
        self.names_unmatched = Gauge(
            "interpretops_names_unmatched",
            "Names in the settings that match no current key, model or alias, by section of the settings.",
            ("place",),
            registry=registry,
        )
        self.engine_starts = Counter("interpretops_engine_starts", "Engines started.", registry=registry)
        self.in_flight = Gauge("interpretops_requests_in_flight", "Requests in progress.", registry=registry)
        self.tasks = Gauge(
            "interpretops_gateway_tasks", "Asyncio tasks of the gateway, when scraped.", registry=registry
        )
        self.task_failures = Counter(
            "interpretops_task_failures",
            "Exceptions that ended a task of the gateway. Permanent tasks are restarted.",
            ("task",),
            registry=registry,
        )
        self.task_down = Gauge(
            "interpretops_task_down",
            "1 while a permanent task keeps failing.",
            ("task",),
            registry=registry,
        )
        self.ttft = Histogram(
            "interpretops_time_to_first_token_seconds",
            "From request read to first streamed event.",
            ("policy",),
            buckets=_TTFT_BUCKETS_S,
            registry=registry,
        )
        self.itl = Histogram(
            "interpretops_inter_token_latency_seconds",
            "From one batch of streamed events to the next.",
            ("policy",),
            buckets=_ITL_BUCKETS_S,
            registry=registry,
        )
        self.e2e = Histogram(
            "interpretops_request_seconds",
            "From request read to last byte.",
            ("policy",),
            buckets=_E2E_BUCKETS_S,
            registry=registry,
        )
        self.overhead = Histogram(
            "interpretops_gateway_overhead_seconds",
            "Time in the gateway itself, before and after the engine.",
            buckets=_OVERHEAD_BUCKETS_S,
            registry=registry,
        )

    def init_policy_series(self, policy: str) -> None:
        """Initialise the series of a policy that may get requests from now on."""
        for counter in (
            *(self.receipts_failed, self.tokens_evaluated, self.edits_applied),
            *(self.gates_fired, self.requests_gated, self.policy_refusals),
        ):
            counter.labels(policy)
        for result in ("ok", "failed"):
            self.canary_pairs.labels(policy, result)
        for role in ("harmful", "benign"):
            self.canary_refusals.labels(policy, role)

    def render(self) -> bytes:
        """The metrics in Prometheus text format."""
        return generate_latest(self.registry)
