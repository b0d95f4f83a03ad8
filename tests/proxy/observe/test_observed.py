"""What operators see: metrics, alert rules and dashboard, checked with a real Prometheus."""

import asyncio
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import ClientSession
from fake_engine import FakeEngine
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from running_gateway import Start, Until

from interpretops.records.transcript_file import make_key
from proxy.observe.audit_file import DISPLACED
from proxy.observe.metrics import OUTCOMES, Metrics
from proxy.observe.request_context import RequestContext
from proxy.observe.supervisor import BRIEF, KEPT, STRAY
from proxy.policies.drift import MIN_REQUESTS

ROOT = Path(__file__).parents[3]
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "interpretops.json"
NAME = re.compile(r"\binterpretops_[a-z_]+")

needs_prometheus = pytest.mark.skipif(
    "CI" not in os.environ and None in (shutil.which("promtool"), shutil.which("prometheus")),
    reason="Debian's package `prometheus` is not installed",
)


def _exposed() -> set[str]:
    """Names of all series that the gateway can expose."""
    names = {family.name for family in text_string_to_metric_families(Metrics().render().decode())}
    return {name + suffix for name in names for suffix in ("", "_total", "_bucket", "_count", "_sum")}


def _queries() -> dict[str, str]:
    panels = json.loads(DASHBOARD.read_bytes())["panels"]
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in panels
        for target in panel.get("targets", ())
    }


def _rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_bytes())["groups"] for rule in group["rules"]]


async def test_receipts_count_by_policy(start: Start, engine: FakeEngine, tmp_path: Path) -> None:
    """A policy's tokens, edits, gates and refusals equal those in the engine's receipts, also on record."""
    path = tmp_path / "audit.jsonl"
    front = await start("calm", **{"audit.path": path})
    for receipt in ({"edits_applied": 5, "gates_fired": 2, "refusals": 1}, {"edits_applied": 1}):
        engine.more = receipt
        status, _, _ = await front.chat(model="tiny-model+calm")
        assert status == 200
    shown = front.apps.gateway.metrics.render().decode()
    for line in (
        'interpretops_policy_tokens_evaluated_total{policy="calm"} 6.0',
        'interpretops_policy_edits_applied_total{policy="calm"} 6.0',
        'interpretops_policy_gates_fired_total{policy="calm"} 2.0',
        'interpretops_policy_requests_gated_total{policy="calm"} 1.0',
        'interpretops_policy_refusals_total{policy="calm"} 1.0',
    ):
        assert line in shown
    requests = [json.loads(line) for line in path.read_bytes().splitlines() if b'"request"' in line]
    assert [record["refusals"] for record in requests] == [1, 0]


async def test_time_between_streamed_events_is_observed(start: Start, engine: FakeEngine) -> None:
    """Every batch of streamed events after the first adds to its policy's inter-token latency."""
    front = await start("calm")
    engine.trick = "hold_stream"
    body = {"model": "tiny-model+calm", "messages": [], "stream": True}
    async with front.public.post("/v1/chat/completions", json=body) as answer:
        await answer.content.readany()
        engine.go_on.set()
        await answer.content.read()
    families = text_string_to_metric_families(front.apps.gateway.metrics.render().decode())
    counts = {
        (sample.name, sample.labels.get("policy")): sample.value for one in families for sample in one.samples
    }
    assert counts[("interpretops_time_to_first_token_seconds_count", "calm")] == 1
    assert 1 <= counts[("interpretops_inter_token_latency_seconds_count", "calm")] <= 3


@needs_prometheus
def test_every_alert_fires_in_its_rule_tests() -> None:
    """promtool's unit tests of the rules pass; each rule has a test in which it fires."""
    done = subprocess.run(
        ["promtool", "test", "rules", "rules.test.yaml"], cwd=RULES.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tested = yaml.safe_load((RULES.parent / "rules.test.yaml").read_bytes())["tests"]
    fired = {
        case["alertname"] for test in tested for case in test["alert_rule_test"] if case.get("exp_alerts")
    }
    assert fired == {rule["alert"] for rule in _rules()}


@needs_prometheus
def test_example_configuration_loads() -> None:
    """Prometheus accepts the example configuration."""
    example = RULES.parent / "prometheus.yaml"
    done = subprocess.run(["promtool", "check", "config", str(example)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_and_panels_name_metrics_that_exist() -> None:
    """No alert or panel uses a series that the gateway never exposes."""
    asked = {name for rule in _rules() for name in NAME.findall(rule["expr"])}
    asked |= {name for query in _queries().values() for name in NAME.findall(query)}
    assert asked - _exposed() == set()


async def test_alert_counters_exist_before_their_first_event(
    start: Start, engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every counter that an alert uses exists with 0 from the start, for all label values.

    Prometheus sees no increase in a series that appears with its first event.
    """
    monkeypatch.setenv("KEPT", make_key())
    tenant = {"id": "anonymous", "transcripts": {"key": "env:KEPT"}}
    bindings = [
        {"policy": "absent", "mode": "mandatory", "match": {"route": "/v1/completions"}},
        {"policy": "calm", "mode": "mandatory"},
    ]
    paths = {"paths.state": tmp_path / "state", "audit.path": tmp_path / "audit.jsonl"}
    front = await start("calm", "other", tenants=[tenant], bindings=bindings, **paths)
    policies = {"calm", "other", "absent", "absent+calm"}
    domains: dict[str, dict[str, set[str]]] = {
        "interpretops_receipts_failed_total": {"policy": {*policies, "none"}},
        "interpretops_audit_displaced_total": {"file": set(DISPLACED)},
        "interpretops_engine_starts_total": {},
        "interpretops_engine_unattested_total": {"engine": {str(engine.socket)}},
        "interpretops_task_failures_total": {"task": {*KEPT, *BRIEF, STRAY}},
        "interpretops_request_outcomes_total": {"outcome": set(OUTCOMES)},
        "interpretops_policy_tokens_evaluated_total": {"policy": policies},
        "interpretops_policy_edits_applied_total": {"policy": policies},
        "interpretops_canary_pairs_total": {"policy": policies, "result": {"ok", "failed"}},
        "interpretops_transcripts_total": {"tenant": {"anonymous"}, "result": {"stored", "lost"}},
        "interpretops_gateway_overhead_seconds_bucket": {},
    }
    shown = list(text_string_to_metric_families(front.apps.gateway.metrics.render().decode()))
    counted = {name for family in shown for name in _names(family) if family.type in ("counter", "histogram")}
    asked = {name for rule in _rules() for name in NAME.findall(rule["expr"])}
    assert asked & (counted | {name for name in asked if name.endswith("_total")}) == domains.keys()
    samples = {sample for family in shown for sample in map(_identity, family.samples)}
    for name, labels in domains.items():
        for values in itertools.product(*labels.values()):
            assert (name, frozenset(zip(labels, values, strict=True))) in samples
    for family in shown:
        for sample in family.samples:
            if sample.name in domains and sample.name != "interpretops_engine_starts_total":
                assert sample.value == 0, sample


def _names(family: Metric) -> set[str]:
    return {sample.name for sample in family.samples}


def _identity(sample: Sample) -> tuple[str, frozenset[tuple[str, str]]]:
    return sample.name, frozenset(item for item in sample.labels.items() if item[0] != "le")


def test_rule_tests_start_without_the_counters() -> None:
    """In the rule tests every counter is absent at first, as before a gateway starts, or is old."""
    tests = yaml.safe_load((RULES.parent / "rules.test.yaml").read_bytes())["tests"]
    for series in (series for test in tests for series in test["input_series"]):
        if re.match(r"\w+_(total|bucket)\{", series["series"]):
            assert re.match(r"_|[1-9]\d*x\d+$|(\d+) (\1 ?)+$", series["values"]), series


def test_every_alert_has_a_runbook_entry() -> None:
    """The runbook has a heading for each alert, and each alert links to its own."""
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / "alerts.md").read_text(), re.MULTILINE)
    assert headings == [rule["alert"] for rule in _rules()]
    for rule in _rules():
        assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{rule['alert'].lower()}"


def test_committed_dashboard_is_the_generated_one() -> None:
    """The committed dashboard matches the generator; no two panels share an id or a position."""
    script = DASHBOARD.parent / "generate.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout == DASHBOARD.read_text()
    panels = json.loads(done.stdout)["panels"]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(places) == len({panel["id"] for panel in panels}) == len(panels)


@pytest.fixture
async def prometheus(tmp_path: Path, until: Any) -> AsyncIterator[Any]:
    """Start a real Prometheus that scrapes one address every second; returns a query function."""
    running: list[asyncio.subprocess.Process] = []

    async def scrape(target: str) -> Any:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        config = tmp_path / "prometheus.yaml"
        job = {"job_name": "interpretops", "static_configs": [{"targets": [target]}]}
        config.write_text(yaml.safe_dump({"global": {"scrape_interval": "1s"}, "scrape_configs": [job]}))
        running.append(
            await asyncio.create_subprocess_exec(
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address={address}",
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )
        )

        async def ready() -> bool:
            try:
                async with ClientSession() as session, session.get(f"http://{address}/-/ready") as answer:
                    return answer.status == 200
            except OSError:
                return False

        async def ask(query: str) -> list[Any]:
            url = f"http://{address}/api/v1/query"
            async with ClientSession() as session, session.get(url, params={"query": query}) as answer:
                reported = await answer.json()
                assert reported["status"] == "success", f"{query}: {reported}"
                return list(reported["data"]["result"])

        await until(ready, 30)
        return ask

    yield scrape
    for process in running:
        process.terminate()
        await process.wait()


@needs_prometheus
async def test_every_panel_query_works_in_a_real_prometheus(
    start: Start,
    engine: FakeEngine,
    prometheus: Callable[..., Awaitable[list[dict[str, Any]]]],
    until: Until,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prometheus scrapes the gateway, accepts every query, and returns data where there was traffic."""
    monkeypatch.setenv("KEPT", make_key())
    tenant = {"id": "anonymous", "transcripts": {"key": "env:KEPT"}}
    front = await start(
        "calm", tenants=[tenant], **{"canary.interval_s": 0.05, "paths.state": tmp_path / "state"}
    )
    revision = front.apps.gateway.catalogue.entries["calm"].active.revision
    for _ in range(MIN_REQUESTS):
        front.apps.gateway.drift.note(
            RequestContext("r", policy="calm", revision=revision, evaluated=3, edits=1)
        )
    front.apps.gateway.drift.pin("calm", "test")

    async def traffic() -> None:
        engine.trick = ""
        await front.chat(model="tiny-model+calm")
        await front.chat(model="tiny-model+calm", stream=True)
        await front.chat(model="tiny-model+gone")
        engine.trick = "no_receipt"
        await front.chat(model="tiny-model+calm")

    admin = front.admin._base_url
    ask = await prometheus(f"{admin.host}:{admin.port}")

    async def seen() -> bool:
        await traffic()
        timed = await ask("interpretops_canary_measure{measure='latency_overhead'}")
        return bool(timed and await ask("rate(interpretops_policy_edits_applied_total[30s]) > 0"))

    engine.more = {"edits_applied": 5, "gates_fired": 2}
    await until(seen, 30)
    silent = set()
    for title, query in _queries().items():
        found = await ask(query.replace("$__rate_interval", "30s"))
        if not found:
            silent.add(title)
    assert silent == {
        "Shadow results A",
        "Client disconnects A",
        "Stalled connections closed A",
        "Requests moved to another engine A",
    }
    for rule in _rules():
        await ask(rule["expr"])
