"""LCO of a card: measured for the policy itself, in turns on one engine, or absent with a reason."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from scripted_gateway import REVISION, Gateway, served

from discovery.errors import DiscoveryError
from discovery.evaluation.answers import endpoint as endpoint_module
from discovery.evaluation.card_of_run import make_card
from discovery.evaluation.evaluation_run import Run
from discovery.evaluation.job import measure
from discovery.evaluation.measures import latency as latency_module
from discovery.evaluation.measures.latency import REQUESTS, TOKENS, why_not_here
from discovery.evaluation.options import JobOptions
from discovery.evaluation.subject import Subject
from discovery.evaluation.suites.suite_files import load_suite
from interpretops.plan import ModelSpec
from interpretops.policy import load_policy
from interpretops.riskcard import RiskCard
from interpretops.riskcard.markdown import card_markdown
from interpretops.riskcard.page import card_html

POLICY = """
meta: {id: guard}
interventions:
  - {type: head_scale, selector: {layer: 1, heads: [0]}, scale: 0.5}
"""
OFF_S, ON_S = 1.0, 1.25
"""What a timed request takes by the clock of the tests."""


class Timed(Gateway):
    """Takes time by a clock of its own: a quarter longer under the policy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.now, self.arms = 0.0, list[str]()
        self.hold = self._take
        clock = SimpleNamespace(perf_counter=lambda: self.now, monotonic=lambda: self.now)
        monkeypatch.setattr(latency_module, "time", clock)

    async def _take(self, policy: str) -> None:
        self.arms.append(policy)
        self.now += OFF_S if policy == "none" else ON_S


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry at once."""
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(latency_module, "MOST_S", 1e9)


async def evaluated(folder: Path, gateway: Gateway, price: float | None = None, **options: Any) -> RiskCard:
    """One evaluation of eleven benign prompts, one of them too long to be timed."""
    prompts = [f"kind {i}" for i in range(10)] + ["long " * 1000]
    (folder / "kind.json").write_text(json.dumps(prompts))
    source = {"path": "kind.json", "role": "benign", "licence": "own"}
    (folder / "suite.yaml").write_text(yaml.safe_dump({"name": "own", "sources": [source]}))
    (folder / "guard.yaml").write_text(POLICY)
    model = ModelSpec("tiny", "12" * 32, "LlamaForCausalLM", 24, 6, 3, 1, 8, 100)
    subject = Subject(load_policy(folder / "guard.yaml"), REVISION, model)
    async with served(gateway) as url:
        chosen = JobOptions("guard", url=url, out=folder / "out", **options)
        loaded = load_suite(folder / "suite.yaml")
        run = Run(loaded, subject, chosen, folder / "out", price_per_hour=price)
        return make_card(run, await measure(run, None))


async def test_overhead_is_that_of_the_policy_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter more time is LCO 25 %; rounds take turns, one more warms up, each has a cache of its own."""
    gateway = Timed(monkeypatch)
    card = await evaluated(tmp_path, gateway, latency_rounds=6)
    measure = card.measures["latency_cost_overhead"]
    assert (measure.value, measure.n) == (pytest.approx(ON_S / OFF_S - 1), 6)
    assert card.latency is not None
    assert (card.latency.requests, card.latency.tokens) == (REQUESTS, TOKENS)
    assert card.latency.off.median_s == pytest.approx(REQUESTS * OFF_S)
    assert card.latency.on.median_s == pytest.approx(REQUESTS * ON_S)
    batches = [set(gateway.arms[place : place + REQUESTS]) for place in range(0, len(gateway.arms), REQUESTS)]
    assert batches == [{"none"}, {"guard"}, {"guard"}, {"none"}] * 3 + [{"none"}, {"guard"}]
    assert len(set(gateway.salts)) == len(batches)
    assert any("does not show" in note and note.startswith("LCO") for note in card.notes)


async def test_stopped_timing_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept rounds of this machine are not timed again; those of another machine and torn lines are."""
    await evaluated(tmp_path, Timed(monkeypatch), latency_rounds=5)
    kept = tmp_path / "out" / "latency.jsonl"
    lines = [line for line in kept.read_text().splitlines() if line]
    again = Timed(monkeypatch)
    await evaluated(tmp_path, again, latency_rounds=5)
    assert again.arms == []
    other = json.dumps(json.loads(lines[0]) | {"machine": "another"})
    kept.write_text("\n".join([*lines[:3], other, lines[4][:20]]))
    rest = Timed(monkeypatch)
    card = await evaluated(tmp_path, rest, latency_rounds=5)
    assert len(rest.arms) == 2 * REQUESTS * (1 + 2)
    assert card.measures["latency_cost_overhead"].n == 5


async def test_slow_machine_gets_fewer_rounds_or_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No round begins after the minute; with too few of them LCO is absent, and says so."""
    monkeypatch.setattr(latency_module, "MOST_S", 5 * REQUESTS * (OFF_S + ON_S))
    card = await evaluated(tmp_path, Timed(monkeypatch), latency_rounds=12)
    assert card.measures["latency_cost_overhead"].n == 5
    monkeypatch.setattr(latency_module, "MOST_S", REQUESTS * (OFF_S + ON_S))
    (tmp_path / "out" / "latency.jsonl").unlink()
    card = await evaluated(tmp_path, Timed(monkeypatch), latency_rounds=12)
    assert "a median needs 5" in str(card.measures["latency_cost_overhead"].absent)
    assert card.latency is None


async def test_another_revision_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that is changed while it is timed ends the job: its times would be of two revisions."""
    gateway = Timed(monkeypatch)
    batches = gateway.hold

    async def change(policy: str) -> None:
        await batches(policy)
        if len(gateway.arms) > 3 * REQUESTS:
            gateway.revision = "cd" * 32

    gateway.hold = change
    with pytest.raises(
        DiscoveryError, match=r"guard@cdcdcdcdcdcd answered while guard@abababababab was timed"
    ):
        await evaluated(tmp_path, gateway)


async def test_unequal_answers_are_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ends an answer early gives no time per token."""
    gateway = Timed(monkeypatch)
    gateway.most_tokens = 7
    card = await evaluated(tmp_path, gateway)
    assert "7 tokens instead of 32" in str(card.measures["latency_cost_overhead"].absent)
    card = await evaluated(tmp_path, gateway, latency_rounds=0)
    assert "not asked for" in str(card.measures["latency_cost_overhead"].absent)


@pytest.mark.parametrize(
    ("url", "engines", "expected"),
    [
        ("http://127.0.0.1:8000", (), None),
        ("http://localhost:8000", ("unix:///run/engine.sock", "http://127.0.0.2:8100"), None),
        ("http://[::1]:8000/v1", (), None),
        ("https://guard.example:8000", (), "the gateway is on another machine (guard.example)"),
        ("http://10.0.0.7:8000", (), "the gateway is on another machine (10.0.0.7)"),
        ("http://127.0.0.1:8000", ("http://gpu-1:8100",), "the engine runs on another machine"),
        ("http://127.0.0.1:8000", ("dns+http://engines:8100",), "the engine runs on another machine"),
    ],
)
def test_only_an_engine_of_this_machine_is_timed(
    url: str, engines: tuple[str, ...], expected: str | None
) -> None:
    """Elsewhere the network would be timed too, so that there is a reason instead of a number."""
    found = why_not_here(url, engines)
    assert found is None if expected is None else str(found).startswith(expected)


async def test_price_gives_cost_and_none_is_told_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """$3.60 an hour is a tenth of a cent a second: 1 s and 1.25 s a request cost $1 and $1.25 a thousand."""
    card = await evaluated(tmp_path, Timed(monkeypatch), price=3.6, latency_rounds=5)
    assert card.latency is not None
    assert card.latency.cost_per_1000_requests(card.latency.off) == pytest.approx(1.0)
    for text in (card_markdown(card), card_html(card)):
        assert "$1.0000" in text
        assert "$1.2500" in text
        assert "at $3.6 an hour" in text
    free = await evaluated(tmp_path, Timed(monkeypatch), latency_rounds=5)
    assert "price" in card_markdown(free)
    assert "runtime.price_per_hour is not set" in card_html(free)
