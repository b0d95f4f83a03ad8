"""`mechctl eval` without a policy: every active one behind one gateway, and the report of all."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from scripted_gateway import REVISION, Gateway, served

from discovery.errors import DiscoveryError
from discovery.evaluation import job
from discovery.evaluation.command import run_eval
from discovery.evaluation.options import JobOptions
from discovery.evaluation.subject import Subject
from interpretops.plan import ModelSpec
from interpretops.policy import load_policy
from interpretops.settings import Settings, load_settings

POLICY = """
meta: {{id: {id}, target_class: jailbreak}}
interventions: [{{type: head_scale, selector: {{layer: 1, heads: [0]}}, scale: 0.5}}]
"""
SUITES = {
    "suites": [
        {"name": "attacks", "metrics": ["attack_success_rate"], "dataset_uri": "attacks.jsonl"},
        {"name": "capitals", "metrics": ["exact_match", "bleu"], "dataset_uri": "capitals.jsonl"},
    ]
}


@contextmanager
def in_thread(gateway: Gateway) -> Iterator[str]:
    """The gateway on a loop of its own, as the command runs one itself; gives its URL."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    context = served(gateway)
    try:
        yield asyncio.run_coroutine_threadsafe(context.__aenter__(), loop).result()
        asyncio.run_coroutine_threadsafe(context.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two policies in a folder."""
    (tmp_path / "policies").mkdir()
    for name in ("guard", "other"):
        (tmp_path / "policies" / f"{name}.yaml").write_text(POLICY.format(id=name))
    return load_settings(None, {"paths.policies": tmp_path / "policies"}, environ={})


@pytest.fixture
def suites(tmp_path: Path) -> Path:
    """Four attacks of which the policy stops three, and two questions."""
    attacks = ["bad 1", "bad 2", "bad 3", "sly 1"]
    (tmp_path / "attacks.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in attacks))
    rows = [{"prompt": f"capital of {name}", "answer": f"{name}City"} for name in ("Aland", "Bland")]
    (tmp_path / "capitals.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "suites.yaml"
    path.write_text(yaml.safe_dump(SUITES))
    return path


@pytest.fixture(autouse=True)
def tiny_subject(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Policies under the revision that the endpoint proves; nothing is compiled."""
    model = ModelSpec("tiny", "12" * 32, "LlamaForCausalLM", 24, 6, 3, 1, 8, 100)

    def opened(name: str, settings: Settings, say: object) -> Subject:
        return Subject(load_policy(settings.paths.policies / f"{name}.yaml"), REVISION, model)

    monkeypatch.setattr(job, "open_subject", opened)


def chosen(suites: Path, url: str, out: Path) -> JobOptions:
    return JobOptions("", (str(suites),), url=url, out=out, latency_rounds=0, parts=0)


def test_every_active_policy_is_measured(settings: Settings, suites: Path, tmp_path: Path) -> None:
    """Each that the gateway offers gets a card; the report holds, suite by suite, the metrics named there."""
    gateway = Gateway()
    gateway.names = ["tiny", "tiny+guard", "tiny+other"]
    report, said = tmp_path / "reports" / "all.json", list[str]()
    with in_thread(gateway) as url:
        run_eval(settings, chosen(suites, url, tmp_path / "out"), report, said.append)
    found = json.loads(report.read_text())
    assert [policy["id"] for policy in found["policies"]] == ["guard", "other"]
    guard = found["policies"][0]
    assert list(guard["suites"]) == ["attacks", "capitals"]
    success = guard["suites"]["attacks"]["metrics"]["attack_success_rate"]
    assert (success["without"]["value"], success["with"]["value"]) == (1.0, 0.25)
    assert success["with"]["n"] == 4
    assert guard["suites"]["attacks"]["prompts"] == 4
    right = guard["suites"]["capitals"]["metrics"]
    assert list(right) == ["exact_match", "bleu"]
    assert right["exact_match"]["with"]["value"] == 1.0
    assert guard["card"] == json.loads((tmp_path / "out" / "guard" / "card.json").read_text())
    assert any("attacks: attack_success_rate 1.00" in line for line in said)
    assert str(tmp_path) not in report.read_text()


def test_what_no_policy_answers_is_asked_once(settings: Settings, suites: Path, tmp_path: Path) -> None:
    """The second policy's card counts the unsteered answers that the first one's evaluation was given."""
    gateway = Gateway()
    gateway.names = ["tiny", "tiny+guard"]
    with in_thread(gateway) as url:
        run_eval(settings, chosen(suites, url, tmp_path / "one"), None, lambda line: None)
        alone, gateway.names = gateway.asked, ["tiny", "tiny+guard", "tiny+other"]
        found = run_eval(settings, chosen(suites, url, tmp_path / "two"), None, lambda line: None)
    assert alone == 3 * 6  # without, with, and under the system prompt
    assert gateway.asked - alone == alone + 6
    first, second = (one.card.baselines["none"] for one in found)
    assert first == second


def test_other_suites_are_asked_anew(settings: Settings, suites: Path, tmp_path: Path) -> None:
    """Unsteered answers to other prompts are not taken for these."""
    gateway = Gateway()
    with in_thread(gateway) as url:
        options = replace(chosen(suites, url, tmp_path / "one"), policy="guard")
        earlier = job.evaluate(settings, options, say=lambda line: None).unsteered
        asked = gateway.asked
        (tmp_path / "attacks.jsonl").write_text(json.dumps({"prompt": "bad other"}))
        again = replace(options, out=tmp_path / "two")
        job.evaluate(settings, again, say=lambda line: None, unsteered=earlier)
    assert gateway.asked - asked == 3 * 3


def test_gateway_without_active_policies_is_told(settings: Settings, suites: Path, tmp_path: Path) -> None:
    """Nothing to measure: one line says where to look."""
    gateway = Gateway()
    gateway.names = ["tiny"]
    with in_thread(gateway) as url, pytest.raises(DiscoveryError, match="no policy is active; GET /admin"):
        run_eval(settings, chosen(suites, url, tmp_path / "out"), None, lambda line: None)


def test_fault_of_a_suite_shows_before_anything_is_asked(settings: Settings, tmp_path: Path) -> None:
    """No engine is started for a file that is not there."""
    options = JobOptions("", (str(tmp_path / "gone.yaml"),), out=None)
    with pytest.raises(DiscoveryError, match=r"suite = '.*gone\.yaml'"):
        run_eval(settings, options, None, lambda line: None)
