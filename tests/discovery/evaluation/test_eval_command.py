"""`mechctl eval` as one command: its own engine and gateway, policy and baselines, a card at the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from discovery.errors import DiscoveryError
from discovery.evaluation.answers.own_gateway import own_gateway
from discovery.evaluation.job import evaluate_policy
from discovery.evaluation.options import JobOptions
from interpretops.policy import load_policy
from interpretops.riskcard import card_for, load_card
from interpretops.settings import load_settings


def test_gateway_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    """The reason of a gateway that dies at its start reaches the user, with the name of its log."""
    settings = load_settings(None, {"model.name": str(tmp_path / "no-such-model")}, environ={})
    with (
        pytest.raises(DiscoveryError, match=r"did not start: .*no-such-model.*gateway\.log") as raised,
        own_gateway(settings, tmp_path, tmp_path, tmp_path, None, lambda line: None),
    ):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.engine
@pytest.mark.slow
def test_one_command_measures_the_shipped_guard(
    repository: Path, default_model_dir: Path, tmp_path: Path
) -> None:
    """Own prompts through a real engine: every arm is proven, every baseline stands on the card."""
    prompts = repository / "discovery" / "prompts" / "contrast.yaml"
    lists = yaml.safe_load(prompts.read_text())
    for name in ("harmful", "benign"):
        (tmp_path / f"{name}.json").write_text(json.dumps(lists[name][:6]))
    (tmp_path / "text.txt").write_text(
        "The library opens at nine, and its reading room is on the first floor. " * 40
    )
    (tmp_path / "facts.json").write_text(
        json.dumps([{"q": "The sky is", "right": "blue", "wrong": "square"}] * 2)
    )
    sources: list[dict[str, Any]] = [
        {"path": "harmful.json", "role": "harmful"},
        {"path": "benign.json", "role": "benign"},
        {"path": "text.txt", "role": "text", "limit": 3},
        {"path": "facts.json", "role": "factual", "field": "q", "answer": "right", "against": "wrong"},
    ]
    suite = {"name": "own", "sources": [{"licence": "Apache-2.0", **source} for source in sources]}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    policies = tmp_path / "policies"
    policies.mkdir()
    (policies / "jailbreak.yaml").write_text((repository / "policies" / "jailbreak.yaml").read_text())
    settings = load_settings(
        None,
        {"paths.policies": policies, "paths.artifacts": repository / "sae_artifacts"},
        environ={},
    )
    out = tmp_path / "out"
    said: list[str] = []
    card = evaluate_policy(
        settings,
        JobOptions(
            "jailbreak",
            (str(tmp_path / "suite.yaml"),),
            out=out,
            max_tokens=16,
            baseline_limit=3,
            answer_limit=3,
            latency_rounds=5,
            parts=3,
            publish=True,
        ),
        say=said.append,
    )
    assert {kind for kind, baseline in card.baselines.items() if baseline.absent} == set()
    for name in (
        "defense_efficacy",
        "collateral_damage",
        "delta_ce",
        "delta_ce_answers",
        "factual_likelihood",
        "latency_cost_overhead",
        "causal_contribution",
    ):
        assert card.measures[name].value is not None, name  # type: ignore[index]  # its names are literals
    assert card.measures["defense_efficacy"].n == 6
    assert card.baselines["ungated"].measures["defense_efficacy"].n == 3
    policy = load_policy(policies / "jailbreak.yaml")
    assert card_for(policy, card.policy.revision, policies).card == card
    assert load_card(policies / "cards" / "jailbreak.json") == load_card(out / "card.json")
    assert str(tmp_path) not in (out / "card.md").read_text()
